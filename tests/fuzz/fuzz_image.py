"""Fuzz the decoder, the verifier and the containers with atheris (not part of the test suite).

    pip install atheris
    mkdir -p /tmp/corpus && PYTHONPATH=. python tests/fuzz/fuzz_image.py /tmp/corpus -max_len=20000

It runs until it is stopped (`-max_total_time=600` stops it after ten minutes), starting from small
sound images of each wrapping. The invariants are those of tests/fuzz/invariants.py; a broken one
ends the run and leaves the input as `crash-...`; the script, given that file, repeats it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["xsave"]):
    from tests.fuzz.invariants import check
    from tests.image.strategies import hvm_values, image, pv_values


def seed(directory):
    """Put the beginnings into an empty corpus."""
    if not directory.is_dir() or any(directory.iterdir()):
        return
    short = [*pv_values()[:5], *pv_values()[7:]]
    for fmt in ("xl", "libxl", "libxc"):
        (directory / f"pv-{fmt}").write_bytes(image(fmt, short))
    (directory / "hvm").write_bytes(image("libxl", hvm_values(), guest_type=2))
    (directory / "v2").write_bytes(image("libxc", pv_values(version=2)[:3], version=2))


def main():
    """Run libFuzzer on `check`."""
    atheris.Setup(sys.argv, lambda data: check(bytes(data)))
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            seed(Path(argument))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
