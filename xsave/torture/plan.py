"""Which points of a window are tried: all, or a fixed sample that leaves out no instruction.

The window of one life has some 150 000 boundaries, most of them in loops over the 512 entries of
a table. A sample takes the first boundary at each instruction at each depth of the stack, which
is nearly every way there, and fills up with points drawn by the seed. The same window, seed and
limits give the same sample.
"""

from __future__ import annotations

import numpy as np

from xsave.torture.settings import Settings


def choose(rips: np.ndarray, depths: np.ndarray, settings: Settings, limit: int) -> np.ndarray:
    """Return the numbers of the points to try, ascending, of a window with these points.

    limit: how many at most (0: none); below the number of distinct instructions it is a sample
    of the instructions.
    """
    nr = rips.size
    if settings.every:
        return np.union1d(np.arange(0, nr, settings.every), _firsts(rips))
    if not limit or limit >= nr:
        return np.arange(nr)
    rng = np.random.default_rng(settings.seed)
    chosen = _firsts(rips)
    if chosen.size >= limit:
        return np.sort(rng.permutation(chosen)[:limit])
    for more in (_firsts(rips * np.uint64(8191) + depths), np.arange(nr)):
        more = np.setdiff1d(more, chosen)
        more = rng.permutation(more)[: limit - chosen.size]
        chosen = np.union1d(chosen, more)
    return chosen


def _firsts(keys: np.ndarray) -> np.ndarray:
    """Return where each key stands first, ascending."""
    return np.sort(np.unique(keys, return_index=True)[1])
