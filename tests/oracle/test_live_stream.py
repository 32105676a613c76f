"""What a live migration sends is a stream that Xen's own verifier takes, and ours."""

from __future__ import annotations

import pytest

from tests.flows.flow import MIB, create, runs_on, wait_for_tick
from tests.flows.live import migrate_live
from tests.oracle.test_verify_stream_v2 import errors_of
from xsave.host.host import add_host
from xsave.host.transport import Channel, Receiver
from xsave.image.buffers import Rows, Zeros


@pytest.fixture
def sent(monkeypatch):
    """The bytes that go to the receiver."""
    data = bytearray()
    write = Channel.write

    def write_and_keep(self, buffers):
        kept = []
        for buffer in buffers:
            part = buffer.gather() if isinstance(buffer, Rows) else buffer
            part = bytes(part.nbytes) if isinstance(part, Zeros) else bytes(part)
            data.extend(part)
            kept.append(part)
        write(self, kept)

    monkeypatch.setattr(Channel, "write", write_and_keep)
    return data


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_live_stream(xsave_home, sent, zeroes, monkeypatch, tmp_path, xen_verify):
    """Six rounds of a guest that writes and makes page tables all the while; with empty pages as
    XALLOC, and without, as any receiver takes them."""
    monkeypatch.setattr(Receiver, "is_xsave", zeroes)
    host, target = (add_host(name, 64 * MIB, seed=ord(name)) for name in "ab")
    create(host, memory_bytes=16 * MIB, cmdline="touch=1M write=2M rate=20M rest=2")
    wait_for_tick(host)
    result = migrate_live(host, target)
    assert result.nr_rounds > 3
    runs_on(target)
    image = bytes(sent).removesuffix(b"domain is yours, you are cleared to unpause\0")
    (tmp_path / "sent").write_bytes(image)
    code, said = xen_verify(tmp_path / "sent", "xl")
    assert code == 0, said
    assert errors_of(image) == []
