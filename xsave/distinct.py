"""Numbers, each once and ascending: np.unique for who cannot wait while that loads numpy.ma."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def distinct(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Return what is in these arrays (n,) of int64, none of it twice, ascending."""
    numbers = np.concatenate([np.empty(0, np.int64), *parts])
    numbers.sort()
    first = np.ones(numbers.size, bool)
    np.not_equal(numbers[1:], numbers[:-1], out=first[1:])
    return numbers[first]
