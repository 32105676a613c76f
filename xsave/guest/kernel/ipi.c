/*
 * ipi.c - messages between CPUs: an event channel of kind IPI for each message and receiver.
 */
#include "events.h"
#include "hypercall.h"
#include "smp.h"
#include "time.h"

static struct spinlock call_lock;
static void (*call_fn)(void);
static int call_waiting;	/* CPUs that have not done it yet */

/* The event itself is the message: need_resched is set, and its way out looks at that. */
static void reschedule_interrupt(void)
{
}

static void call_function_interrupt(void)
{
	void (*fn)(void) = READ_ONCE(call_fn);

	if (fn)
		fn();
	__atomic_sub_fetch(&call_waiting, 1, __ATOMIC_SEQ_CST);
}

void smp_send_reschedule(struct cpu *cpu)
{
	if (cpu->resched_irq)
		notify_remote_via_irq(cpu->resched_irq);
}

/* Call fn, with events masked, on every CPU, and wait for all. With events on. */
void on_each_cpu(void (*fn)(void))
{
	struct cpu *cpu;
	int masked;

	spin_lock(&call_lock);
	WRITE_ONCE(call_fn, fn);
	__atomic_store_n(&call_waiting, nr_cpus - 1, __ATOMIC_SEQ_CST);
	for_each_online_cpu(cpu)
		if (cpu != this_cpu())
			notify_remote_via_irq(cpu->call_irq);
	masked = local_irq_save();
	fn();
	local_irq_restore(masked);
	while (READ_ONCE(call_waiting))
		HYPERVISOR_sched_op(SCHEDOP_yield, NULL);
	WRITE_ONCE(call_fn, NULL);
	spin_unlock(&call_lock);
}

/* At start, from any CPU. */
void bind_ipis(struct cpu *cpu)
{
	cpu->resched_irq = bind_ipi_to_irqhandler(cpu->id, reschedule_interrupt);
	cpu->call_irq = bind_ipi_to_irqhandler(cpu->id, call_function_interrupt);
}
