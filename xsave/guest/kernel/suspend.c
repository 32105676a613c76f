/*
 * suspend.c - to sleep on this host, to wake on any. Linux's names, in Linux's order:
 *
 *     freeze_processes, freeze_kernel_threads    no thread holds an mfn any more
 *     dpm_suspend           quiesce the devices: nothing half said to the far ends
 *     stop_machine          every CPU in migration/N, events masked; on CPU 0:
 *       xen_pre_suspend     pin every address space, store and console mfn -> pfn in start_info,
 *                           shared_info unmapped (it belongs to the host)
 *       HYPERVISOR_suspend  1: cancelled, or saved with --leave-running; same domain goes on
 *                           0: a new domain, with new frames, ports and a new shared_info
 *       xen_post_suspend    the mirror image, and each vCPU's vcpu_info in its place
 *     on_each_cpu(tick_resume), dpm_resume, thaw_processes
 *     dpm_complete        what takes time and holds nobody up; Linux does it before the thaw
 *
 * freezer=off and stop_machine=off leave a step out, to show what it is good for.
 */
#include "console.h"
#include "device.h"
#include "events.h"
#include "freezer.h"
#include "hypercall.h"
#include "mm.h"
#include "smp.h"
#include "suspend.h"
#include "time.h"
#include "xenbus.h"

#define ERROR_NODE "error/suspend"
#define STOPPED_TURNS 3
/* Who was frozen is late, and this thread goes before all of them: let each have a turn first. (The
 * event that ends a sleep has equals take turns, too.) */
#define LATE_TURNS 4
#define TURN_NS NSEC_PER_MSEC

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
	} else {
		xen_vcpu_restore();
	}
	mm_unpin_all();
}

/* Bind what this kernel listens to anew; xenbus does its own part in xs_resume(). */
static void irq_resume(void)
{
	xen_irq_resume();
	console_resume();
}

/* On CPU 0, events masked, on init_mm's tables; with nothing else running under stop_machine(). */
static noinline int xen_suspend(void *data)
{
	static struct sched_shutdown arg = { SHUTDOWN_suspend };
	int *cancelled = data;

	BUG_ON(this_cpu()->id || this_cpu()->active_mm != &init_mm);
	timekeeping_suspend();
	xen_pre_suspend();
	*cancelled = HYPERVISOR_suspend(&arg,
					p2m_entry(virt_to_pfn(xen_start_info)),
					end_of_stack(current));
	xen_post_suspend(*cancelled);
	timekeeping_resume();
	if (!*cancelled)
		irq_resume();
	return 0;
}

/* The other CPUs get turns, and do nothing with them. */
static noinline int xen_suspend_stopped(void *data)
{
	u64 before = nr_context_switches();
	int turn, rc;

	for (turn = 0; nr_cpus > 1 && turn < STOPPED_TURNS; turn++)
		HYPERVISOR_sched_op(SCHEDOP_yield, NULL);
	rc = xen_suspend(data);
	for (turn = 0; nr_cpus > 1 && turn < STOPPED_TURNS; turn++)
		HYPERVISOR_sched_op(SCHEDOP_yield, NULL);
	BUG_ON(nr_context_switches() != before);
	return rc;
}

static noinline void suspend_unstopped(int *cancelled)
{
	int masked = local_irq_save();

	xen_suspend(cancelled);
	local_irq_restore(masked);
}

/* The frames from here down to the hypercall stand on a zeroed stack: their unused slots show
 * nothing of what this thread did before. */
static noinline void enter_suspend(int *cancelled)
{
	stack_scrub(end_of_stack(current));
	if (cmdline_is("stop_machine", "off"))
		suspend_unstopped(cancelled);
	else
		stop_machine(xen_suspend_stopped, cancelled);
}

/* 0, or an error with everything thawed. */
static int freeze_all(void)
{
	int rc = freeze_processes();

	return rc ? rc : freeze_kernel_threads();
}

/* Tell the toolstack, so that it need not wait for its time-out. */
static void suspend_failed(const char *why)
{
	printk("SUSPEND failed: %s\n", why);
	xs_write(0, ERROR_NODE, why);
}

noinline void do_suspend(void)
{
	int freezer = !cmdline_is("freezer", "off"), cancelled = 1, turn;

	printk("SUSPEND\n");
	xs_rm(0, ERROR_NODE);
	if (freezer && freeze_all()) {
		suspend_failed(freezer_failure());
		return;
	}
	if (dpm_suspend()) {
		if (freezer)
			thaw_processes();
		suspend_failed("a device does not suspend");
		return;
	}
	enter_suspend(&cancelled);
	if (!cancelled)
		on_each_cpu(tick_resume);
	dpm_resume(cancelled);
	if (freezer)
		thaw_processes();
	for (turn = 0; !cancelled && turn < LATE_TURNS; turn++)
		schedule_timeout(TURN_NS);
	printk("RESUME %s\n", cancelled ? "cancelled" : "new");
	if (cancelled)
		return;
	dpm_complete();
	advertise_shutdown_features();
}
