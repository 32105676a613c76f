/*
 * irq.c - irqs: this kernel's own numbers for where events come from.
 *
 * Who binds a source of events (a VIRQ or an IPI of some CPU, a port that start_info or an
 * allocation gave) gets an irq and keeps it. The port behind it is the host's: in a new domain
 * none of the old ones means anything. xen_irq_resume() forgets them all and binds the VIRQs and
 * IPIs anew; for other ports their owners know the new ones and call rebind_evtchn_irq(), or
 * unbind_from_irq() while there is none. A port that is bound starts masked and on CPU 0.
 */
#include "events.h"
#include "hypercall.h"
#include "kernel.h"
#include "sched.h"

enum irq_type { IRQT_UNBOUND, IRQT_EVTCHN, IRQT_VIRQ, IRQT_IPI };

/* irq 0 is none. Four for each CPU at most, the two rings', and some to spare. */
static struct irq_desc {
	enum irq_type type;
	u32 port;		/* 0: no port now */
	u32 virq;
	int cpu;		/* whose event it is: the words of pending bits are shared */
	int bindcount;
	void (*handler)(void);
} irqs[48];

static u8 evtchn_to_irq[NR_EVENT_CHANNELS];
static struct spinlock irq_lock;

/* The irq of this very source, or a free one that is it from now on. irq_lock is held. */
static int find_irq(enum irq_type type, u32 virq, int cpu, u32 port)
{
	int irq, free = 0;

	for (irq = ARRAY_SIZE(irqs) - 1; irq; irq--) {
		struct irq_desc *desc = &irqs[irq];

		if (!desc->bindcount)
			free = irq;
		else if (desc->type == type && desc->virq == virq && desc->cpu == cpu &&
			 (type != IRQT_EVTCHN || desc->port == port))
			return irq;
	}
	if (!free)
		panic("no room for another irq");
	irqs[free].type = type;
	irqs[free].virq = virq;
	irqs[free].cpu = cpu;
	return free;
}

static void attach_port(u32 port, int irq)
{
	BUG_ON(evtchn_to_irq[port] || irqs[irq].port);
	evtchn_to_irq[port] = irq;
	irqs[irq].port = port;
}

static u32 bind_ipi(int cpu)
{
	struct evtchn_bind_ipi bind = { .vcpu = cpu };

	if (HYPERVISOR_event_channel_op(EVTCHNOP_bind_ipi, &bind))
		panic("no IPI to CPU %d", cpu);
	return bind.port;
}

static u32 bind_virq(u32 virq, int cpu)
{
	struct evtchn_bind_virq bind = { .virq = virq, .vcpu = cpu };
	long rc = HYPERVISOR_event_channel_op(EVTCHNOP_bind_virq, &bind);

	if (rc)
		panic("bind_virq %u refused: %ld", virq, rc);
	return bind.port;
}

static u32 new_port(const struct irq_desc *desc)
{
	return desc->type == IRQT_IPI ? bind_ipi(desc->cpu) : bind_virq(desc->virq, desc->cpu);
}

/* port 0: Xen is asked for one, unless the source is bound already. */
static int bind_irq(enum irq_type type, u32 virq, int cpu, u32 port, void (*handler)(void))
{
	int masked = spin_lock_irqsave(&irq_lock);
	int irq = find_irq(type, virq, cpu, port);

	if (!irqs[irq].bindcount++) {
		irqs[irq].handler = handler;
		attach_port(port ? port : new_port(&irqs[irq]), irq);
		unmask_evtchn(irqs[irq].port);
	}
	spin_unlock_irqrestore(&irq_lock, masked);
	return irq;
}

int bind_evtchn_to_irqhandler(u32 port, void (*handler)(void))
{
	return bind_irq(IRQT_EVTCHN, 0, 0, port, handler);
}

int bind_virq_to_irqhandler(u32 virq, int cpu, void (*handler)(void))
{
	return bind_irq(IRQT_VIRQ, virq, cpu, 0, handler);
}

/* By which any CPU can interrupt `cpu`: of each message its own. */
int bind_ipi_to_irqhandler(int cpu, void (*handler)(void))
{
	static u32 nr_messages;

	return bind_irq(IRQT_IPI, nr_messages++, cpu, 0, handler);
}

/* The irq's events come from `port` from now on. */
void rebind_evtchn_irq(u32 port, int irq)
{
	struct evtchn_bind_vcpu bind = { .port = port, .vcpu = 0 };
	int masked = spin_lock_irqsave(&irq_lock);

	mask_evtchn(port);
	attach_port(port, irq);
	irqs[irq].cpu = 0;
	HYPERVISOR_event_channel_op(EVTCHNOP_bind_vcpu, &bind);
	unmask_evtchn(port);
	spin_unlock_irqrestore(&irq_lock, masked);
}

/*
 * Count first: the irq may have no port any more, as after a restore, and is given up all the
 * same. What has its old port's number now may be anybody's.
 */
void unbind_from_irq(int irq)
{
	int masked = spin_lock_irqsave(&irq_lock);
	struct irq_desc *desc = &irqs[irq];

	BUG_ON(!desc->bindcount);
	if (--desc->bindcount == 0) {
		if (desc->port) {
			if (HYPERVISOR_event_channel_op(EVTCHNOP_close, &desc->port))
				panic("port %u does not close", desc->port);
			evtchn_to_irq[desc->port] = 0;
		}
		memset(desc, 0, sizeof(*desc));
	}
	spin_unlock_irqrestore(&irq_lock, masked);
}

/* Have the event come (again): pending under the mask, so that unmasking raises it. */
int retrigger_irq(int irq)
{
	u32 port = irqs[irq].port;
	int masked;

	if (!port)
		return 0;
	masked = mask_evtchn(port);
	set_evtchn(port);
	if (!masked)
		unmask_evtchn(port);
	return 1;
}

u32 evtchn_from_irq(int irq)
{
	return irqs[irq].port;
}

void notify_remote_via_irq(int irq)
{
	if (irqs[irq].port)
		notify_remote_via_evtchn(irqs[irq].port);
}

/* In a new domain. All its ports are masked, and ours are gone. */
void xen_irq_resume(void)
{
	u32 port;
	int irq;

	for (port = 0; port < NR_EVENT_CHANNELS; port++)
		mask_evtchn(port);
	memset(evtchn_to_irq, 0, sizeof(evtchn_to_irq));
	for (irq = 1; irq < (int)ARRAY_SIZE(irqs); irq++)
		irqs[irq].port = 0;
	for (irq = 1; irq < (int)ARRAY_SIZE(irqs); irq++) {
		if (irqs[irq].type != IRQT_VIRQ && irqs[irq].type != IRQT_IPI)
			continue;
		attach_port(new_port(&irqs[irq]), irq);
		unmask_evtchn(irqs[irq].port);
	}
}

/* From the upcall, with the port pending and not masked. */
void handle_evtchn(u32 port)
{
	struct irq_desc *desc = &irqs[evtchn_to_irq[port]];

	if (desc->handler && desc->cpu != this_cpu()->id)
		return;		/* pending for another CPU, in the same word */
	clear_evtchn(port);
	if (desc->handler)
		desc->handler();
}
