"""The points are the instruction boundaries there are, each once."""

from __future__ import annotations

from xsave.torture import forks


def steps(lab):
    """(rip, depth) of every point."""
    return [(p.index, p.rip, p.depth) for p in lab.window().walk()]


def test_as_many_as_a_trace_counts(lab):
    """One instruction at a time, and running free with a counter: the same number."""
    walked = forks.in_child(lambda: steps(lab))
    assert [index for index, _, _ in walked] == list(range(len(walked)))
    assert forks.in_child(lambda: lab.window().trace()) == len(walked) > 50_000
    first, last = lab.symbols.window
    assert first <= walked[0][1] <= last
    assert all(depth >= 0 for _, _, depth in walked)
    names = {lab.symbols.function(rip)[0] for _, rip, _ in walked}
    assert names >= {
        "set_entry", "queue_mmu_update", "flush_mmu_updates", "mm_init", "mm_exit", "mm_pin",
        "mm_unpin", "load_cr3", "pte_alloc", "memset",
    }  # fmt: skip
