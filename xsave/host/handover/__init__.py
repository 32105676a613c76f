"""The hand-over of a migration: exactly one side may run the guest, and both can be asked which.

    table.py      the protocol as data: states, steps, what each end does in turn, what a pair means
    journal.py    a side's state on its host, written down before the step is taken
    copy.py       the domain process's part: it alone takes the steps that let a guest run or end
    play.py       goes through the table's rows, at both ends
    recovery.py   asks both ends and brings about what their pair of states means

The commit point is one write at the target: `ready` becomes `running`, by the process of the copy
itself, just before its first instruction. Until then the guest is the source's, from then on the
target's. Whoever wants the guest back writes `abandoned` over `ready` first: one of the two wins.
"""
