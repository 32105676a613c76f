/*
 * balloon.c - this kernel has as many pages as memory/target says, if it can.
 *
 * Fewer: free pages are taken out of the direct map and given back to Xen; their pfns become
 * holes of the p2m. More: holes are filled again, the lowest first; when there are none left the
 * p2m grows at its end, or from balloon_at=SIZE on, which leaves a gap as memory hotplug does.
 * Xen refuses what is over the domain's maximum: then try again once a second.
 *
 * The watch only notes the target: the thread that follows it handles mfns, so it is freezable,
 * and between two steps holds none.
 */
#include "balloon.h"
#include "freezer.h"
#include "hypercall.h"
#include "mm.h"
#include "sched.h"
#include "xenbus.h"

#define BATCH 64
#define KEEP_FREE 64UL		/* pages a shrinking kernel keeps for itself */

static u64 target;		/* pages we are to have; 0: nobody said yet */
static u64 nr_pages;		/* pages we have */
static u64 boot_end;		/* pfns we began with: [0, boot_end) */
static u64 grow_start, grow_end;	/* pfns added since */
static u64 nr_holes, first_hole;	/* those of both without a frame */
static WAIT_QUEUE(balloon_waitq);

static u64 pfns[BATCH];
static u64 frames[BATCH];	/* in a hypercall: pfns or mfns; zeros else */

static noinline long memory_reservation(int cmd, u32 count)
{
	struct xen_memory_reservation args = {
		.extent_start = frames,
		.nr_extents = count,
		.domid = DOMID_SELF,
	};

	return HYPERVISOR_memory_op(cmd, &args);
}

static noinline void map_or_zap(u64 pfn, u64 pte)
{
	u64 va = (u64)pfn_to_virt(pfn);

	if (HYPERVISOR_update_va_mapping(va, pte, UVMF_INVLPG | UVMF_ALL))
		panic("balloon: update_va_mapping of pfn %lx refused", pfn);
}

static void note_hole(u64 pfn)
{
	first_hole = nr_holes ? min(first_hole, pfn) : pfn;
	nr_holes++;
}

/* The next pfn at the end: room in the p2m and in the direct map, no frame. */
static noinline int grow(void)
{
	if (p2m_grow(grow_end) || !pte_alloc(&init_mm, (u64)pfn_to_virt(grow_end)))
		return -1;
	note_hole(grow_end++);
	return 0;
}

static u32 find_holes(u32 wanted)
{
	u64 pfn = first_hole;
	u32 n = 0;

	while (n < min(wanted, nr_holes)) {
		if (get_phys_to_machine(pfn) == INVALID_P2M_ENTRY)
			pfns[n++] = pfn;
		if (++pfn == boot_end)
			pfn = grow_start;
	}
	return n;
}

/* Returns how many pages we have more. */
static noinline u32 increase_reservation(u32 wanted)
{
	long done, i;
	u32 n;

	while (nr_holes < wanted && !grow())
		;
	n = find_holes(wanted);
	memcpy(frames, pfns, n * sizeof(u64));
	done = n ? memory_reservation(XENMEM_populate_physmap, n) : 0;
	for (i = 0; i < done; i++) {
		set_phys_to_machine(pfns[i], frames[i]);
		map_or_zap(pfns[i], make_pte(pfns[i], PAGE_KERNEL));
		free_page(pfn_to_virt(pfns[i]));
	}
	memset(frames, 0, sizeof(frames));
	if (done <= 0)
		return 0;
	first_hole = pfns[done - 1];
	nr_holes -= done;
	nr_pages += done;
	return done;
}

/* Returns how many pages we have less. */
static noinline u32 decrease_reservation(u32 wanted)
{
	u32 n, i;
	void *page;

	for (n = 0; n < wanted && nr_free_pages() > KEEP_FREE; n++) {
		page = alloc_page();
		if (!page)
			break;
		pfns[n] = virt_to_pfn(page);
		frames[n] = pfn_to_mfn(pfns[n]);
	}
	for (i = 0; i < n; i++) {
		map_or_zap(pfns[i], 0);
		set_phys_to_machine(pfns[i], INVALID_P2M_ENTRY);
		note_hole(pfns[i]);
	}
	if (n && memory_reservation(XENMEM_decrease_reservation, n) != n)
		panic("balloon: Xen does not take %u pages back", n);
	memset(frames, 0, sizeof(frames));
	nr_pages -= n;
	return n;
}

static noinline u32 balloon_step(void)
{
	u64 wanted = READ_ONCE(target);
	u32 done;

	if (wanted > nr_pages)
		done = increase_reservation(min(wanted - nr_pages, BATCH));
	else
		done = decrease_reservation(min(nr_pages - wanted, BATCH));
	if (nr_pages == wanted)
		printk("balloon: %lu pages of %lu pfns\n", nr_pages, max_pfn);
	return done;
}

static int balloon_work(void)
{
	u64 wanted = READ_ONCE(target);

	return wanted && wanted != nr_pages;
}

static int balloon_thread(void *unused)
{
	(void)unused;
	for (;;) {
		stack_scrub(end_of_stack(current));
		wait_event(&balloon_waitq, balloon_work() || freezing());
		if (balloon_work() && !balloon_step())
			schedule_timeout(NSEC_PER_SEC);
		try_to_freeze();
	}
	return 0;
}

static void target_changed(void)
{
	char kib[24];

	if (xs_read(0, "memory/target", kib, sizeof(kib)))
		return;
	WRITE_ONCE(target, memparse(kib, NULL) / (PAGE_SIZE / 1024));
	wake_up_all(&balloon_waitq);
}

static struct xenbus_watch target_watch = {
	.path = "memory/target",
	.callback = target_changed,
};

/* Before anything else changes the p2m; watches work. */
void balloon_init(void)
{
	nr_pages = boot_end = max_pfn;
	grow_start = grow_end = max(boot_end, cmdline_number("balloon_at", 0) / PAGE_SIZE);
	BUG_ON(!kthread_run(balloon_thread, NULL, 0, "balloon"));
	register_xenbus_watch(&target_watch);
}
