/*
 * suspend.c - to sleep on this host, to wake on any.
 *
 *     freeze_processes      no thread holds an mfn any more
 *     console, xs_suspend   quiesce: nothing half said to the far ends
 *     stop_machine
 *       pre_suspend         pin every address space, store and console mfn -> pfn in start_info,
 *                           shared_info unmapped (it belongs to the host)
 *       HYPERVISOR_suspend  1: cancelled, or saved with --leave-running; same domain goes on
 *                           0: a new domain, with new frames, ports and a new shared_info
 *       post_suspend        the mirror image
 *     and back up.
 */
#include "console.h"
#include "events.h"
#include "hypercall.h"
#include "mm.h"
#include "sched.h"
#include "suspend.h"
#include "time.h"
#include "xenbus.h"

/* The mfns of start_info become pfns: the toolstack puts the new mfns there. */
static noinline void xen_pre_suspend(void)
{
	mm_pin_all();
	xen_start_info->store_mfn = store_pfn();
	xen_start_info->console_mfn = console_pfn();
	unmap_shared_info();
}

static noinline void xen_post_suspend(int cancelled)
{
	build_mfn_list_list();
	map_shared_info();
	publish_mfn_list_list(HYPERVISOR_shared_info);
	if (cancelled) {
		xen_start_info->store_mfn = pfn_to_mfn(store_pfn());
		xen_start_info->console_mfn = pfn_to_mfn(console_pfn());
	}
	mm_unpin_all();
}

/* Bind what this kernel listens to anew; xenbus does its own part in xs_resume(). */
static void irq_resume(void)
{
	unbind_all_handlers();
	time_resume();
	console_resume();
}

/* Under stop_machine(). The one thread that runs is this one, on init_mm's tables. */
static noinline int xen_suspend(void *data)
{
	static struct sched_shutdown arg = { SHUTDOWN_suspend };
	int *cancelled = data;

	BUG_ON(this_cpu()->active_mm != &init_mm);
	timekeeping_suspend();
	xen_pre_suspend();
	*cancelled = HYPERVISOR_suspend(&arg,
					p2m_entry(virt_to_pfn(xen_start_info)),
					end_of_stack(current));
	xen_post_suspend(*cancelled);
	timekeeping_resume();
	if (*cancelled)
		unmask_all_handlers();
	else
		irq_resume();
	return 0;
}

/* The frames from here down to the hypercall stand on a zeroed stack: their unused slots show
 * nothing of what this thread did before. */
noinline void do_suspend(void)
{
	int cancelled = 1;

	printk("SUSPEND\n");
	if (freeze_processes()) {
		printk("SUSPEND failed: threads refuse to freeze\n");
		return;
	}
	console_suspend();
	xs_suspend();
	stack_scrub(end_of_stack(current));
	stop_machine(xen_suspend, &cancelled);
	printk("RESUME %s\n", cancelled ? "cancelled" : "new");
	if (cancelled)
		xs_suspend_cancel();
	else
		xs_resume();
	thaw_processes();
	if (!cancelled)
		advertise_shutdown_features();
}
