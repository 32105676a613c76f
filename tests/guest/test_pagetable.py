"""Page types and counts, against a slow model, and against a recount of the tables themselves."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.guest.pagetable_model import (
    CODE,
    FORBIDDEN,
    FRAME,
    REFUSED,
    XEN_ENTRIES,
    Model,
    recount,
)
from tests.guest.rig import FULL, MIB, READ_ONLY, Machines
from xsave.frames import PTE_GLOBAL, PTE_NX, PTE_PCD, PTE_PRESENT, PTE_PSE, PTE_USER
from xsave.guest.xen.domctl import Domctl
from xsave.guest.xen.pagetable import PageTables
from xsave.guest.xen.pagetypes import PGT_L4, PGT_NONE, PGT_SEG_DESC, PGT_WRITABLE, PGT_XEN
from xsave.guest.xen.pins import Pins

DOMID, OTHER = 1, 2
#: What each frame of the small world is mostly used as; two of each level, four plain ones.
ROLES = (4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0)
SLOTS = (0, 1, 255, 256, 271, 272, 511)

where_any = st.sampled_from(range(len(ROLES)))
where_table = st.sampled_from(range(8))
odd_flags = st.sampled_from([0, PTE_PCD, PTE_PSE, PTE_GLOBAL, PTE_NX, 1 << 52 | 1 << 9])


def below(level):
    """The frames meant for what a table of this level points to."""
    return [i for i, role in enumerate(ROLES) if role == max(level - 1, 0)]


def good_entries(level):
    """(target, flags) of an entry that will do, unless its target is in use as something else."""
    flags = st.sampled_from([PTE_PRESENT, FULL, READ_ONLY, FULL, FULL | PTE_NX])
    return st.tuples(st.sampled_from(below(level)), flags)


def odd_entries():
    """(target, flags) of any entry, to anywhere."""
    flags = st.integers(0, 7).flatmap(lambda low: odd_flags.map(lambda odd: low | odd))
    return st.tuples(st.integers(0, 19), flags)


class World(RuleBasedStateMachine):
    """One domain's twelve frames and the model beside them."""

    machines: Machines
    machine = None

    def __init__(self):
        super().__init__()
        machine = type(self).machine
        self.frames = [int(mfn) for mfn in machine.allocate(DOMID, len(ROLES))]
        xen = int(machine.allocate(DOMID, 1)[0])
        machine.page_type[xen] = PGT_XEN
        foreign = int(machine.allocate(OTHER, 1)[0])
        free = int(np.flatnonzero(machine.owner == 0x7FF4)[0])
        #: What an entry may name: own frames, and from 12 on nothing a guest may have.
        self.names = [*self.frames, xen, foreign, free, 0, 1, machine.nr_frames, (1 << 40) - 1, 600]
        self.outside = [xen, foreign]
        self.tables = PageTables(machine, DOMID, XEN_ENTRIES)
        self.model = Model(self.frames, XEN_ENTRIES, self.machine.nr_frames)
        self.held = Counter()
        machine.marked, self.seen_types = set(), self.types()

    def types(self):
        """The types of the frames as a toolstack sees them."""
        return Domctl.page_types(self, np.array(self.frames, np.uint64))

    def teardown(self):
        """Whatever was held is let go: no count and no reference is left anywhere."""
        machine = self.machine
        machine.marked = None
        for mfn, uses in self.held.items():
            for _ in range(uses):
                self.tables.put_type(mfn)
        for mfn in self.frames:
            if machine.pinned[mfn]:
                assert self.tables.unpin(mfn) == 0
        assert not machine.type_count[self.frames].any()
        assert not machine.refs[self.frames].any()
        assert not machine.page_type[self.frames].any()
        machine.free_domain(DOMID)
        machine.free_domain(OTHER)

    # -- what the guest asks ---

    @initialize(data=st.data())
    def fill(self, data):
        """The tables get a few entries while they are ordinary pages."""
        for where, level in enumerate(ROLES[:8]):
            content = st.dictionaries(st.sampled_from(SLOTS), good_entries(level), max_size=3)
            for slot, (target, flags) in data.draw(content).items():
                self.update(where, slot, self.names[target] << 12 | flags, False)

    def update(self, where, slot, entry, preserve):
        mfn = self.frames[where]
        expected = self.model.attempt(self.model.update, mfn, slot, entry, preserve)
        assert self.tables.mmu_update((mfn << 12) + 8 * slot, entry, preserve) == expected

    @rule(where=where_table, slot=st.sampled_from(SLOTS), data=st.data(), keep=st.booleans())
    def map_something(self, where, slot, data, keep):
        """A plausible entry."""
        target, flags = data.draw(good_entries(ROLES[where]))
        self.update(where, slot, self.names[target] << 12 | flags, keep)

    @rule(where=where_any, slot=st.sampled_from(SLOTS), entry=odd_entries(), keep=st.booleans())
    def map_anything(self, where, slot, entry, keep):
        """Any entry, in any frame."""
        self.update(where, slot, self.names[entry[0]] << 12 | entry[1], keep)

    @rule(data=st.data(), value=st.sampled_from([0, CODE, CODE & ~(3 << 45), CODE & ~(1 << 44)]))
    def clear_something(self, data, value):
        """An entry in use goes away, or is overwritten with a descriptor."""
        used = [
            (where, slot)
            for where, mfn in enumerate(self.frames)
            for slot, entry in self.model.content[mfn].items()
            if entry
        ]
        if used:
            self.update(*data.draw(st.sampled_from(used)), value, False)

    @rule(which=st.integers(12, 19), entry=st.integers(0, (1 << 64) - 1))
    def mmu_update_elsewhere(self, which, entry):
        """Eight bytes of a frame that is not the guest's."""
        assert self.tables.mmu_update(self.names[which] << 12, entry) == REFUSED

    @rule(where=where_table, level=st.none() | st.none() | st.integers(1, 4))
    def pin(self, where, level):
        """MMUEXT_PIN_Ln_TABLE, mostly of the level the frame is meant for."""
        level = level or ROLES[where] or 1
        expected = self.model.attempt(self.model.pin, self.frames[where], level)
        assert self.tables.pin(self.frames[where], level) == expected

    @rule(which=st.integers(12, 19), level=st.integers(1, 4))
    def pin_elsewhere(self, which, level):
        """A frame that is not the guest's can be neither pinned nor unpinned."""
        assert self.tables.pin(self.names[which], level) == REFUSED
        assert self.tables.unpin(self.names[which]) == REFUSED

    @rule(where=where_any)
    def unpin(self, where):
        """MMUEXT_UNPIN_TABLE."""
        expected = self.model.attempt(self.model.unpin, self.frames[where])
        assert self.tables.unpin(self.frames[where]) == expected

    @rule(which=st.sets(st.integers(0, 19)))
    def unpin_used(self, which):
        """Those of some frames that stay in use are unpinned as one by one, the others left."""
        mfns = sorted({self.names[i] for i in which})
        left = []
        for mfn in mfns:
            if mfn in self.frames and self.model.pinned[mfn] and self.model.count[mfn] > 1:
                assert self.model.attempt(self.model.unpin, mfn) == 0
            else:
                left.append(mfn)
        assert Pins(self.tables).unpin_used(np.array(mfns, np.uint64)).tolist() == left

    @rule(which=st.sets(st.integers(0, 19)), level=st.integers(1, 4))
    def pin_many(self, which, level):
        """What is in no use and names only what is in use as it should be is pinned at once; of
        level 1 all that are in no use and valid beside each other, or none."""
        mfns = sorted({self.names[i] for i in which})
        ready = self.pin_ready(mfns, level)
        pinned = Pins(self.tables).pin(np.array(mfns, np.uint64), level)
        assert pinned.tolist() == [mfn in ready for mfn in mfns]

    @rule(which=st.sets(st.integers(0, 19)))
    def pin_l1s(self, which):
        """The same, and then whatever else can be pinned as an L1 table."""
        mfns = sorted({self.names[i] for i in which})
        ready = self.pin_ready(mfns, 1)
        for mfn in mfns:
            if mfn not in ready and self.model.attempt(self.model.pin, mfn, 1) == 0:
                ready.append(mfn)
        pinned = Pins(self.tables).pin_l1s(np.array(mfns, np.uint64))
        assert pinned.tolist() == [mfn in ready for mfn in mfns]

    def pin_ready(self, mfns, level):
        """Pin in the model what can be at once."""
        model = self.model
        new = [mfn for mfn in mfns if model.count.get(mfn) == 0]
        if level == 1:
            return new if model.attempt(lambda: [model.pin(mfn, 1) for mfn in new]) == 0 else []
        ready = [mfn for mfn in new if self.names_tables(mfn, level)]
        for mfn in ready:
            model.pin(mfn, level)
        return ready

    def names_tables(self, mfn, level):
        """True if all entries name tables of the level below that are in use."""
        model = self.model
        entries = [entry for _, entry in model.guests_entries(mfn, level)]
        targets = [(entry & FRAME) >> 12 for entry in entries]
        return not any(entry & FORBIDDEN[level] for entry in entries) and all(
            model.count.get(target) and model.type[target] == level - 1 for target in targets
        )

    @rule(where=where_any, want=st.sampled_from([PGT_L4, PGT_SEG_DESC, PGT_WRITABLE]))
    def hold(self, where, want):
        """What cr3, a GDT frame or a ring takes."""
        mfn = self.frames[where]
        expected = self.model.attempt(self.model.take, mfn, want)
        assert self.tables.get_type(mfn, want) == expected
        self.held[mfn] += expected == 0

    @precondition(lambda self: self.held.total())
    @rule(data=st.data())
    def let_go(self, data):
        """One of the things held is given up."""
        mfn = data.draw(st.sampled_from([m for m, uses in self.held.items() if uses]))
        self.model.drop(mfn)
        self.tables.put_type(mfn)
        self.held[mfn] -= 1

    # -- what is always so ---

    @invariant()
    def the_model_agrees(self):
        """Types, counts, references, pins and contents are the model's."""
        machine, model = self.machine, self.model
        for mfn in self.frames:
            assert machine.page_type[mfn] == model.type[mfn]
            assert machine.type_count[mfn] == model.count[mfn]
            assert machine.refs[mfn] == model.refs[mfn]
            assert machine.pinned[mfn] == model.pinned[mfn]
            # A refused table may have got its user bits all the same.
            loose = np.uint64(~PTE_USER & (1 << 64) - 1)
            expected = np.zeros(512, np.uint64)
            expected[list(model.content[mfn])] = list(model.content[mfn].values())
            assert ((machine.mem[mfn] ^ expected) & loose == 0).all()

    @invariant()
    def the_tables_themselves_agree(self):
        """The counts are what the tables in use, the pins and the holders add up to; no table is
        mapped writable; no entry in use names a frame of another's."""
        machine = self.machine
        uses, refs = recount(machine, self.frames)
        for mfn in self.frames:
            named = uses[mfn] + int(machine.pinned[mfn]) + self.held[mfn]
            assert machine.type_count[mfn] == named
            assert machine.refs[mfn] == refs[mfn]
            assert (machine.page_type[mfn] == PGT_NONE) == (named == 0)
        assert not machine.type_count[self.outside].any()
        assert not machine.refs[self.outside].any()

    @invariant()
    def another_type_is_marked(self):
        """A toolstack that looks only at marked frames again knows the types of all."""
        types = self.types()
        changed = np.array(self.frames)[types != self.seen_types]
        assert self.machine.marked.issuperset(changed.tolist())
        self.machine.marked, self.seen_types = set(), types


def test_types_and_counts_against_a_model():
    """Any sequence of requests is answered as a slow model answers it, and leaves the types,
    counts and contents the model has; the counts are what a recount of the tables gives; once
    everything is let go, all are zero."""
    machines = Machines()
    World.machine = machines.make(8 * MIB)
    try:
        run_state_machine_as_test(
            World, settings=settings(max_examples=100, stateful_step_count=40)
        )
    finally:
        machines.close()
