"""A console's log keeps the newest of what its guest said, and no more than its share."""

from __future__ import annotations

from xsave.guest.xen import console


def test_the_newest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "LOG_LIMIT_BYTES", 100)
    path = tmp_path / "console.log"
    said = b""
    for _ in range(2):  # a guest that is restarted goes on in the same log
        log = console.Console(path)
        for number in range(20):
            said += (line := b"line %4d\n" % number)
            log.put(line)
            assert said.endswith(path.read_bytes())
            assert min(len(said), 40) <= path.stat().st_size <= 100
        log.close()
