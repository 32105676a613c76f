/*
 * console.c - printk into the shared console ring.
 *
 * The ring is written with events masked, so lines stay whole, and works from the first
 * instruction: its page and port are in start_info. A full ring is waited for by polling its
 * port, which needs neither scheduler nor upcalls. Without a ring, Xen's own log is used.
 */
#include "console.h"
#include "device.h"
#include "events.h"
#include "hypercall.h"
#include "mm.h"
#include "sched.h"
#include "time.h"

#define FLUSH_TIMEOUT NSEC_PER_SEC
#define POLL_NS (10 * NSEC_PER_MSEC)

static volatile struct xencons_interface *ring;
static u64 ring_pfn;
static u32 port;
static int irq;
static struct spinlock console_lock;

static u32 ring_used(void)
{
	return ring->out_prod - ring->out_cons;
}

/* Give the CPU away until the far end has read something, or a moment has passed. */
static void wait_for_reader(void)
{
	u32 ports[1] = { port };
	struct sched_poll poll = { .ports = ports, .nr_ports = 1 };

	notify_remote_via_evtchn(port);
	clear_evtchn(port);
	rmb();
	if (ring_used() < sizeof(ring->out))
		return;
	poll.timeout = ktime_to_system_time(ktime_get() + POLL_NS);
	if (HYPERVISOR_sched_op(SCHEDOP_poll, &poll))
		HYPERVISOR_sched_op(SCHEDOP_yield, NULL);
}

static void ring_write(const char *s, u64 n)
{
	u32 room, prod;

	while (n) {
		prod = ring->out_prod;
		room = min(sizeof(ring->out) - ring_used(), n);
		if (!room) {
			wait_for_reader();
			continue;
		}
		for (n -= room; room; room--)
			ring->out[prod++ % sizeof(ring->out)] = *s++;
		wmb();
		ring->out_prod = prod;
	}
	notify_remote_via_evtchn(port);
}

void printk(const char *fmt, ...)
{
	char line[200];
	__builtin_va_list args;
	int n, masked;

	__builtin_va_start(args, fmt);
	n = vsnprintf(line, sizeof(line), fmt, args);
	__builtin_va_end(args);
	masked = spin_lock_irqsave(&console_lock);
	if (ring)
		ring_write(line, n);
	else
		HYPERVISOR_console_io(line, n);
	spin_unlock_irqrestore(&console_lock, masked);
}

/* What is typed at this guest is read and dropped: it has no shell. */
static void console_interrupt(void)
{
	ring->in_cons = ring->in_prod;
}

/* The first thing after the per-CPU area; the builder mapped the page beside the kernel. */
noinline void console_early_init(void)
{
	if (!xen_start_info->console_mfn)
		return;
	ring_pfn = mfn_to_pfn(xen_start_info->console_mfn);
	ring = (void *)(VIRT_BASE + (ring_pfn << PAGE_SHIFT));
	port = xen_start_info->console_evtchn;
}

/* The direct map is there. */
void console_remap(void)
{
	if (ring)
		ring = pfn_to_virt(ring_pfn);
}

/* The event channels work (again): take the port start_info names now. */
void console_resume(void)
{
	port = xen_start_info->console_evtchn;
	if (ring && irq)
		rebind_evtchn_irq(port, irq);
	else if (ring)
		irq = bind_evtchn_to_irqhandler(port, console_interrupt);
}

/* Quiesce: let the far end read all of it, so that no line is caught in the image half read. */
void console_suspend(void)
{
	u64 deadline = ktime_get() + FLUSH_TIMEOUT;

	while (ring && ring_used() && ktime_get() < deadline) {
		notify_remote_via_evtchn(port);
		if (ring_used())
			schedule_timeout(NSEC_PER_MSEC);
	}
}

/* Its port is bound again with all others, before the first line can be printed. */
static int console_quiesce(void)
{
	console_suspend();
	return 0;
}

struct device console_device = { .name = "console", .suspend = console_quiesce };

u64 console_pfn(void)
{
	return ring_pfn;
}
