"""Machine code that no well-meant kernel has: privileged, malformed, self-defeating, or random."""

from __future__ import annotations

from tests.fuzz.guest.machinecode import quad

#: Instructions that trap, change what the CPU is, or look into descriptor tables.
_ODD = """
f4 fa fb 0f06 0f08 0f09 0f01d1 0f01d0 0f22c0 0f22d8 0f22e0 0f20d8 0f23f8 0f21f8 0f2200
440f22c0 440f20c0 0f30 0f32 0f31 0f01f9 0f33 0f34 0f35 0f07 480f07 0f0b 0f0b78656e0fa2
0f0b78656e 0fa2 cc cd03 cd04 cd0e cd80 cd82 cdff f1 ce 9d 489d 9c cf 48cf ca0000 cb 48cb 8ed0
8ed8 8ec0 8ee0 8ee8 0f00d8 0f00d0 0f0117 0f011f 0f0137 0f01f8 0f01c8 0f01c9 0f01ca 0f01cb
0f01d5 0f01d4 0f01c1 0f01d8 e410 e610 ec ee 6c 6e f36c f36e ed ef 0f0138 0f013c24 0fae2f
480fae2f 0fae07 480fae07 0fae27 480fae27 0fae17 0fae1f 0faee8 0faef8 dbe3 d9ff dfe0 9b d9f4
dd27 c5f877 c5fd6fc0 62f17c48 c4e27d18c0 f3480faec0 f3480faed0 f3480faed8 0f05 48cf 48f7f0
f7f6 f7f7 d4 37 27 60 ea00000000 9a00000000 ff28 48ff28 ff18 ff20 0f3f 0f04 f00fc70f 0fc70f
480fc70f 660fc737 0fc7f0 0fc7f8 0fc7f9 f30f1efa c8ffff1f c9 c3 c20800 6744
2e2e2e2e2e2e2e2e2e2e2e2e2e2e2e2e90 f0f0f0f0f04801c0 0f1fc0 90 0f0d08 0f18 0f1b 0f19 f30fb8c0
f2f2f2 0f380000 0f3a0000 660f3a 0f79 0f78 660f38 82 62 d6 0fff 0fb9 0f72d010 0f77 0f6f07
0fe707 6627 f30fc7f0 0f0000 0f0010 0f00e0 0f00e8 0f02c0 0f03c0
"""
#: Stores to [rdi] of rax, as a guest may aim at its own page tables.
_STORING = """
488907 8907 668907 8807 488707 8707 f0480907 f0482107 f0483107 f0480fb10f f00fb10f f00fb00f
f0480fab07 f0480fb307 f0480fbb07 f0480fc107 48ab aa 48a5 a4 f348ab fdf348abfc 480fc307
48c70767000000 c7070000 48f717 48ff07 48830701 488f07 f0480fc70f 0f1107 0f2907 660f7f07
660fe707 0fae07 480fae07 dd37 d93f f3a4 48d1 c6072f 480fba2f00 480fba3701 48011f 4887 0f9407
f30f7f07 660fd607
"""
ODDITIES, STORES = (tuple(map(bytes.fromhex, text.split())) for text in (_ODD, _STORING))
LOOPS = {
    "spin": b"\xeb\xfe",
    "hypercalls": b"\xb8\x11\x00\x00\x00\x31\xff\x0f\x05\xeb\xf5",  # xen_version for ever
    "unknown": b"\xb8\xff\xff\x00\x00\x0f\x05\xeb\xf7",
    "traps": b"\x0f\x0b\xeb\xfc",
    "yield": b"\xb8\x1d\x00\x00\x00\x31\xff\x0f\x05\xeb\xf5",
    "rdtsc": b"\x0f\x31\xeb\xfc",
    "cpuid": b"\x0f\xa2\xeb\xfc",
    "stores": b"\x48\xff\x04\x24\xeb\xfa",
}


def random_code(rng, values):
    """A few instructions: odd ones, any bytes, some with registers pointing somewhere."""
    code = bytearray()
    for register in (0xB8, 0xB9, 0xBA, 0xBB, 0xBE, 0xBF):
        if rng.random() < 0.4:
            word = values.anything()
            code += bytes([0x48, register]) + quad(getattr(word, "bits", word))
    for _ in range(rng.randrange(1, 6)):
        kind = rng.random()
        if kind < 0.7:
            code += rng.choice(ODDITIES)
        elif kind < 0.85:
            code += rng.choice(STORES)
        else:
            code += rng.randbytes(rng.randrange(1, 12))
    return bytes(code)
