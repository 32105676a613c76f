"""A short walk with Hypothesis around the invariants that fuzz_image.py tests at length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.invariants import check
from tests.image.strategies import hvm_values, image, pv_values

SEEDS = [
    image("xl", config=b"{}"),
    image("libxl", hvm_values(), guest_type=2),
    image("libxc", pv_values(version=2), version=2),
    b'{"xsave_image": 1, "format": "libxc", "records": [\n{"layer": "tail", "content": "00"}\n]}',
]
edits = st.lists(
    st.tuples(st.integers(0, 30_000), st.integers(0, 9), st.binary(max_size=9)), max_size=4
)


@pytest.mark.parametrize("seed", range(len(SEEDS)))
@given(changes=edits)
def test_edited_images(seed, changes):
    """Sound images with a few bytes replaced, put in or taken out keep the invariants."""
    data = SEEDS[seed]
    for place, removed, inserted in changes:
        at = place % (len(data) + 1)
        data = data[:at] + inserted + data[at + removed :]
    check(data)


@given(st.binary(max_size=500))
def test_any_bytes(data):
    """Any bytes keep the invariants."""
    check(data)
