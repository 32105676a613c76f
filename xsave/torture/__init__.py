"""The freezer's proof: a guest stopped at every instruction that updates a page table.

    settings    the cells of the matrix, their sweeps, the claim
    laboratory  two machines in one process; a guest on A, B where no frame of A is its own
                (machine, door, clockwork, warmcpu, inmemory: what it is made of; forks: snapshots)
    window      the instruction boundaries, walked and, independently, counted
    plan        which of them are tried
    point       one of them: suspend, save, restore, run on; the guest's fate
    stale       what is found in an image; tasks says on whose stack
    refusals    what the hypervisor had to refuse on B
    worker, campaign, journal, table, random, replay: many points, and one again

The pages of a manual that go with it: xsave-torture(1).
"""
