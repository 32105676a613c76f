"""The deeds a hostile kernel chooses from: each writes its code into a kernel.HostileKernel."""

from __future__ import annotations

from tests.fuzz.guest import layout
from tests.fuzz.guest.instructions import STORES, random_code
from tests.fuzz.guest.layout import SCRATCH, STRUCT2, entry, mfn, va
from tests.fuzz.guest.machinecode import SYSCALL
from tests.fuzz.guest.ringdeeds import RING_DEEDS
from tests.guest.hostile import FLAGS, SHAPES
from xsave.public import VcpuGuestContext

_KERNEL_RWX = 0x67
_READ_ONLY = 0x65
_MMU_UPDATE, _UPDATE_VA, _MMUEXT, _MULTICALL, _MEMORY, _VCPU, _IRET = 1, 14, 26, 13, 12, 24, 23
_SELF = 0x7FF0
_MANY = (513, 4096, 1 << 14, 16385, 1 << 16, (1 << 31) + 5, 0xFFFF_FFFF, 1 << 40)


def hypercall(kernel, number=None):
    """One hypercall of a known shape."""
    if number is None:
        number = kernel.rng.choice((*SHAPES, 1, 14, 26, 12, 26, 1))
        if number == 29 and kernel.rng.random() < 0.7:  # most of them never return
            number = 32
    arguments, first, second = kernel.rng.choice(SHAPES[number])
    if first:
        kernel.code.store_words(SCRATCH, [kernel.word(letter) for letter in first * 4])
    if second:
        kernel.code.store_words(STRUCT2, [kernel.word(letter) for letter in second * 8])
    kernel.code.hypercall(number, *[kernel.word(letter) for letter in arguments])


def any_hypercall(kernel):
    """Any number, known or not (grants, domctl, hvm_op...), any arguments."""
    number = kernel.rng.choice((kernel.rng.randrange(56), kernel.rng.getrandbits(32)))
    kernel.code.store_words(SCRATCH, [kernel.word("?") for _ in range(8)])
    kernel.code.hypercall(number, *[kernel.word(kernel.rng.choice("?cpfvn")) for _ in range(5)])


def grants(kernel):
    """grant_table_op: commands and counts, over structures of frames, refs and handles."""
    words = [kernel.word(kernel.rng.choice("fc0nsve1")) for _ in range(12)]
    kernel.code.store_words(SCRATCH, words)
    kernel.code.hypercall(20, kernel.word("c"), SCRATCH, kernel.word("n"))


def table_write(kernel):
    """Stores to the page tables through their read-only mapping, as Linux does it."""
    rng, code = kernel.rng, kernel.code
    table, slot = layout.L1_PFN + rng.randrange(2), rng.randrange(500, 512)
    if rng.random() < 0.3:
        table = rng.choice((layout.L4_PFN, layout.L3_PFN, layout.L2_PFN, layout.L1_PFN))
        slot = rng.randrange(512)
        if rng.random() < 0.1:  # where the table has entries
            slot = {layout.L4_PFN: 511, layout.L3_PFN: 510, layout.L2_PFN: 0}.get(table, slot)
    code.set_rsi(kernel.values.address())
    code.set_rcx(rng.choice((0, 1, 3, 512, 1 << 40)))
    code.load(kernel.word("e"))
    code.set_rdi(va(table, 8 * slot + rng.choice((0, 0, 0, 0, 1, 4, 7))))
    code.raw(rng.choice(STORES))


def instructions(kernel):
    """Odd and random instructions."""
    kernel.code.raw(random_code(kernel.rng, kernel.values))


def address_space(kernel):
    """A second set of page tables, almost right: pinned, used, changed, given up."""
    rng, code = kernel.rng, kernel.code
    first = layout.TABLES_PFN + 4 * rng.randrange(4)
    l4, l3, l2, l1 = range(first, first + 4)
    for pfn in (l4, l3, l2, l1):
        if rng.random() < 0.7:
            code.fill(va(pfn), 0, 512)
    for upper, lower in ((l4, l3), (l3, l2), (l2, l1)):
        for _ in range(rng.choice((1, 1, 2))):
            slot = rng.choice((0, 0, 1, 255, 256, 257, 271, 272, 511))
            code.store(va(upper, 8 * slot), _link(kernel, lower))
    for slot in range(rng.randrange(8)):
        target = rng.choice(
            (layout.CODE_PFN + slot, layout.START_PFN, l1, l4, kernel.values.own_pfn())
        )
        code.store(va(l1, 8 * slot), entry(target, rng.choice(FLAGS)))
    for pfn in (l4, l3, l2, l1):
        if rng.random() < 0.95:
            code.hypercall(_UPDATE_VA, va(pfn), entry(pfn, _READ_ONLY), 2)
    for _ in range(rng.randrange(1, 5)):
        _use_of_tables(kernel, rng.choice((l4, l4, l4, l3, l2, l1)))


def _link(kernel, pfn):
    return entry(pfn, _KERNEL_RWX) if kernel.rng.random() < 0.9 else kernel.word("e")


def _use_of_tables(kernel, pfn):
    rng, code = kernel.rng, kernel.code
    command = rng.choice((0, 1, 2, 3, 3, 3, 4, 5, 15, 15))
    code.store_words(SCRATCH, [command, mfn(pfn), 0])
    code.hypercall(_MMUEXT, SCRATCH, 1, 0, _SELF)
    if rng.random() < 0.4:
        _update(kernel, entry(pfn, 8 * rng.randrange(512) | rng.choice((0, 0, 2))))


def _update(kernel, address):
    kernel.code.store_words(SCRATCH, [address, kernel.word("e")])
    kernel.code.hypercall(_MMU_UPDATE, SCRATCH, 1, 0, _SELF)


def iret(kernel):
    """A frame for HYPERVISOR_iret with anything in it, or none at all."""
    rng, code = kernel.rng, kernel.code
    place = va(layout.SCRATCH_PFN + 1, rng.choice((0, 8, 4096 - 72, 4096 - 64, 4088)))
    rip = rng.choice((kernel.code.here + 400, va(layout.START_PFN, 0x400), kernel.word("v")))
    words = [
        kernel.word("?"), kernel.word("?"), kernel.word("?"),
        rng.choice((0, 0x100, kernel.word("?"))), rip,
        rng.choice((0xE030, 0xE030, 0xE030, 0, 8, 0xE033, kernel.word("?"))),
        rng.choice((0x202, 2, 0x302, 0x44202, kernel.word("?"))),
        rng.choice((layout.STACK_TOP, kernel.word("v"))),
        rng.choice((0xE02B, 0xE02B, 0, 3, kernel.word("?"))),
    ]  # fmt: skip
    code.store_words(place, words)
    code.set_rsp(
        place if rng.random() < 0.9 else rng.choice((0, 8, 1 << 63, 0xFFFF_FFFF_FFFF_FFF8))
    )
    code.load(_IRET)
    code.raw(SYSCALL)


def vcpu(kernel):
    """VCPUOP_initialise with a context of anything, up, down, and what else there is."""
    rng, code = kernel.rng, kernel.code
    code.fill(layout.CONTEXT, rng.choice((0, 0, 0, rng.getrandbits(64))), 646)
    context, regs = VcpuGuestContext, VcpuGuestContext.user_regs.offset
    put = {
        context.flags.offset: rng.choice((4, 4, 4, 0x24, 0, 5)),
        context.ctrlreg.offset + 24: rng.choice((entry(layout.L4_PFN, 0), kernel.word("e"))),
        context.ctrlreg.offset + 8: rng.choice((0, kernel.word("e"))),
        context.gdt_ents.offset: rng.choice((0, 0, kernel.word("g"), kernel.word("?"))),
        context.gdt_frames.offset: kernel.word("f"),
        regs + type(context().user_regs).rip.offset: rng.choice((code.base, kernel.word("v"))),
        regs + type(context().user_regs).rsp.offset: rng.choice((layout.STACK_TOP, 0)),
        regs + type(context().user_regs).rflags.offset: rng.choice((0x202, kernel.word("?"))),
        regs + type(context().user_regs).cs.offset: rng.choice((0xE033, kernel.word("?"))),
        context.event_callback_eip.offset: kernel.word("v"),
        context.kernel_sp.offset: rng.choice((layout.STACK_TOP, kernel.word("v"))),
    }
    for offset, word in put.items():
        code.store(layout.CONTEXT + offset, word)
    code.hypercall(_VCPU, 0, 1, layout.CONTEXT)
    for _ in range(rng.randrange(4)):
        hypercall(kernel, _VCPU)
    code.hypercall(_VCPU, rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 0, 7)), SCRATCH)


def batch(kernel):
    """Batches of up to 4096 calls of up to 16384 requests each, all the same and mostly right."""
    rng, code = kernel.rng, kernel.code
    requests, calls = va(layout.TABLES_PFN + 64), va(layout.TABLES_PFN + 256)
    kind = rng.choice(("mmu", "clear", "copy", "flush", "pin", "memory", "pages"))
    own = mfn(layout.SCRATCH_PFN + 3)
    words = {
        "mmu": [entry(layout.L1_PFN, 8 * 500), entry(layout.SCRATCH_PFN, 0x67)],
        "clear": [16, own, 0],
        "copy": [17, own, mfn(layout.SCRATCH_PFN)],
        "flush": [6, 0, 0],
        "pin": [3, mfn(layout.TABLES_PFN), 0, 4, mfn(layout.TABLES_PFN), 0],
        "memory": [mfn(layout.TABLES_PFN + 128)],
        "pages": [rng.choice((0, 1, 1 << 52))],
    }[kind]
    _repeat(code, requests, words, 128)
    count = rng.choice(_MANY)
    place, number = requests, _MMU_UPDATE if kind == "mmu" else _MMUEXT
    arguments = [place, count, rng.choice((0, STRUCT2)), _SELF]
    if kind in ("memory", "pages"):
        code.store_words(SCRATCH, [place, count, rng.choice((0, 0, 1 << 32)), _SELF])
        number, arguments = _MEMORY, [rng.choice((1, 6)), SCRATCH, 0, 0]
    if rng.random() < 0.7:
        _repeat(code, calls, [number, 0, *arguments, 0, 0], 128)
        number, arguments = _MULTICALL, [calls, rng.choice(_MANY)]
    code.hypercall(number, *arguments)


def _repeat(code, place, words, nr_pages):
    """Fill so many pages with the same words over and over."""
    code.store_words(place, words)
    nr_bytes = 8 * len(words)
    code.copy(place, place + nr_bytes, (nr_pages << 12) - nr_bytes)


def descriptors(kernel):
    """A GDT of one's own with any descriptors, changed while it is loaded; selectors out of it."""
    rng, code = kernel.rng, kernel.code
    page = layout.TABLES_PFN + 20 + rng.randrange(3)
    code.fill(va(page), rng.choice((0, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)), 512)
    for slot in range(8):
        code.store(va(page, 8 * slot), rng.choice((kernel.word("d"), rng.getrandbits(64))))
    code.hypercall(_UPDATE_VA, va(page), entry(page, rng.choice((_READ_ONLY, _KERNEL_RWX))), 2)
    code.store_words(SCRATCH, [mfn(page), kernel.word("f")])
    code.hypercall(2, SCRATCH, rng.choice((8, 512, 513, 0, 7168)))
    for _ in range(rng.randrange(6)):
        code.hypercall(10, entry(page, 8 * rng.randrange(8)), rng.getrandbits(64))
        code.load(
            rng.choice((8 * rng.randrange(8) | rng.randrange(8), 0xE02B, rng.getrandbits(16)))
        )
        code.raw(
            rng.choice((b"\x8e\xd8", b"\x8e\xd0", b"\x8e\xe0", b"\x8e\xe8", b"\x50\x50\x48\xcb"))
        )


def segments(kernel):
    """Callbacks, stacks, segment bases and trap tables that lead nowhere; then a trap."""
    rng = kernel.rng
    for _ in range(rng.randrange(1, 4)):
        hypercall(kernel, rng.choice((0, 3, 4, 25, 30)))
    kernel.code.raw(rng.choice((b"\x0f\x0b", b"\xcc", b"\xcd\x80", b"\x0f\x05", b"\xf4")))


def timers(kernel):
    """Timers and polls at the ends of time."""
    rng, code = kernel.rng, kernel.code
    when = rng.choice((0, 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, kernel.word("?")))
    code.store_words(SCRATCH, [rng.choice((0, 1)), 0, 0])  # bind_virq(VIRQ_TIMER)
    code.store_words(SCRATCH, [0, 0])
    code.hypercall(32, 1, SCRATCH)
    code.hypercall(15, when)
    code.store_words(SCRATCH, [when, kernel.word("c")])
    code.hypercall(_VCPU, rng.choice((6, 7, 8, 9)), kernel.word("c"), SCRATCH)
    code.store_words(SCRATCH, [STRUCT2, kernel.word("n"), when])
    if rng.random() < 0.3:
        code.hypercall(29, 3, SCRATCH)


def scribble(kernel):
    """Overwrite what the kernel, the toolstack or Xen relies on."""
    rng, code = kernel.rng, kernel.code
    pfn = rng.choice(
        (layout.START_INFO_PFN, layout.P2M_PFN, layout.P2M_PFN + 1, layout.STORE_PFN,
         layout.CONSOLE_PFN, layout.SHARED_PFN, layout.SCRATCH_PFN)
    )  # fmt: skip
    nr = rng.choice((1, 8, 512))
    offset = rng.randrange(512 - nr + 1)
    code.fill(va(pfn, 8 * offset), kernel.word("?"), nr)


def suspend(kernel):
    """A suspend nobody asked for, or the one that somebody waits for."""
    kernel.suspend()


DEEDS = {
    "hypercall": hypercall,
    "any hypercall": any_hypercall,
    "grants": grants,
    "table write": table_write,
    "instructions": instructions,
    "address space": address_space,
    "iret": iret,
    "vcpu": vcpu,
    "batch": batch,
    "descriptors": descriptors,
    "segments": segments,
    "timers": timers,
    "scribble": scribble,
    "suspend": suspend,
    **RING_DEEDS,
}
WEIGHTS = {
    "hypercall": 8,
    "table write": 4,
    "instructions": 4,
    "address space": 4,
    "batch": 0.3,
    "suspend": 0.3,
}
