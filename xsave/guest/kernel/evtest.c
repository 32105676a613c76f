/*
 * evtest.c - evtchn=1: a driver without a device, that does with event channels all that drivers
 * do over a suspend, and checks it.
 *
 * Its two ports are of the kind a frontend allocates for its backend: in a new domain they are
 * gone. One irq gets a new port and must work as before; the other one is given up while dead.
 * Nobody is at the far end, so all events are retriggered ones.
 */
#include "device.h"
#include "events.h"
#include "evtest.h"
#include "hypercall.h"
#include "pattern.h"
#include "sched.h"
#include "time.h"

#define PATIENCE 200		/* ms for an event to come */

static int kept_irq, given_up_irq;
static u64 kept_seen, given_up_seen;

static void kept_interrupt(void)
{
	kept_seen++;
}

static void given_up_interrupt(void)
{
	given_up_seen++;
}

static u32 alloc_unbound(void)
{
	struct evtchn_alloc_unbound alloc = { .dom = DOMID_SELF, .remote_dom = 0 };

	if (HYPERVISOR_event_channel_op(EVTCHNOP_alloc_unbound, &alloc))
		panic("no port for evtest");
	return alloc.port;
}

static int is_set(const u64 *bits, u32 port)
{
	return READ_ONCE(bits[port / 64]) >> port % 64 & 1;
}

static int is_pending(int irq)
{
	return is_set(HYPERVISOR_shared_info->evtchn_pending, evtchn_from_irq(irq));
}

static void expect(int truth, const char *what)
{
	if (!truth)
		check_failed(what, kept_seen);
}

/* Unmasking, or anything else just done, made one event come. */
static void expect_one_event(const u64 *seen, u64 before)
{
	int i;

	for (i = 0; i < PATIENCE && READ_ONCE(*seen) == before; i++)
		schedule_timeout(NSEC_PER_MSEC);
	schedule_timeout(NSEC_PER_MSEC);
	expect(READ_ONCE(*seen) == before + 1, "evtchn: one event, not so many");
}

static void raise(int irq, const u64 *seen)
{
	u64 before = READ_ONCE(*seen);

	preempt_disable();
	expect(retrigger_irq(irq), "evtchn: not retriggered");
	/* On the CPU it is for, it does not wait for another event to come. */
	expect(this_cpu()->id || READ_ONCE(*seen) == before + 1, "evtchn: not raised at once");
	preempt_enable();
	expect_one_event(seen, before);
}

/* Leave an event pending under the mask. */
static void raise_masked(void)
{
	u64 before = kept_seen;

	mask_evtchn(evtchn_from_irq(kept_irq));
	retrigger_irq(kept_irq);
	schedule_timeout(NSEC_PER_MSEC);
	expect(kept_seen == before, "evtchn: a masked event came");
	expect(is_pending(kept_irq), "evtchn: a masked event is not pending");
}

static void unmask_raised(void)
{
	u64 before = kept_seen;

	expect(is_pending(kept_irq), "evtchn: a pending event got lost");
	preempt_disable();
	unmask_evtchn(evtchn_from_irq(kept_irq));
	expect(this_cpu()->id || READ_ONCE(kept_seen) == before + 1,
	       "evtchn: not raised by unmasking");
	preempt_enable();
	expect_one_event(&kept_seen, before);
}

/* A port bound twice is one irq, which is there until it was unbound twice. */
static void bind_given_up(void)
{
	u32 port = alloc_unbound();

	given_up_irq = bind_evtchn_to_irqhandler(port, given_up_interrupt);
	expect(bind_evtchn_to_irqhandler(port, given_up_interrupt) == given_up_irq,
	       "evtchn: a second irq for one port");
	unbind_from_irq(given_up_irq);
	raise(given_up_irq, &given_up_seen);
}

static int evtest_suspend(void)
{
	raise_masked();
	return 0;
}

/* The same domain: the event is where it was. */
static void evtest_cancel(void)
{
	unmask_raised();
	raise(given_up_irq, &given_up_seen);
	printk("EVTCHN cancelled: irq %d port %u\n", kept_irq, evtchn_from_irq(kept_irq));
}

static void evtest_resume(void)
{
	struct evtchn_status status = { .dom = DOMID_SELF };
	int irq = kept_irq, dead = given_up_irq;

	expect(!evtchn_from_irq(kept_irq) && !evtchn_from_irq(given_up_irq),
	       "evtchn: a port of the old domain");
	expect(!retrigger_irq(given_up_irq), "evtchn: a dead port retriggered");
	unbind_from_irq(given_up_irq);
	status.port = alloc_unbound();
	expect(is_set(HYPERVISOR_shared_info->evtchn_mask, status.port),
	       "evtchn: a new port is not masked");
	rebind_evtchn_irq(status.port, irq);
	HYPERVISOR_event_channel_op(EVTCHNOP_status, &status);
	expect(status.vcpu == 0, "evtchn: a new port is not CPU 0's");
	raise(irq, &kept_seen);
	bind_given_up();
	expect(given_up_irq == dead, "evtchn: an irq that was unbound is not free");
	printk("EVTCHN new: irq %d port %u\n", irq, evtchn_from_irq(irq));
}

static struct device evtest_device = {
	.name = "evtest",
	.suspend = evtest_suspend,
	.resume = evtest_resume,
	.cancel = evtest_cancel,
};

/* In a thread, as it sleeps. */
void evtest_init(void)
{
	if (!cmdline_number("evtchn", 0))
		return;
	kept_irq = bind_evtchn_to_irqhandler(alloc_unbound(), kept_interrupt);
	raise(kept_irq, &kept_seen);
	raise_masked();
	unmask_raised();
	bind_given_up();
	device_register(&evtest_device);
	printk("EVTCHN irq %d port %u\n", kept_irq, evtchn_from_irq(kept_irq));
}
