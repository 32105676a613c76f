/*
 * stop_machine.c - run a function on CPU 0 while no other CPU does anything at all.
 *
 * Each CPU has a thread migration/N of the highest priority. Woken, it takes its CPU from
 * whatever ran there: without preemption at a point where that had chosen to sleep, which is why
 * this alone makes a non-preemptible kernel saveable. Then all go through the states together:
 * PREPARE (everybody is here), DISABLE_IRQ (and has its events masked), RUN, EXIT. The last one
 * to arrive in a state moves all of them on.
 */
#include "hypercall.h"
#include "sched.h"
#include "smp.h"

enum stopmachine_state {
	STOPMACHINE_NONE,
	STOPMACHINE_PREPARE,
	STOPMACHINE_DISABLE_IRQ,
	STOPMACHINE_RUN,
	STOPMACHINE_EXIT,
};

static MUTEX(stop_mutex);
static WAIT_QUEUE(stop_waitq);
static int wanted[NR_CPUS];	/* to wake migration/N */
static int running;		/* of them, still under way */
static int state, thread_ack;
static int (*stop_fn)(void *);
static void *stop_data;
static int stop_ret;

static void set_state(int new_state)
{
	WRITE_ONCE(thread_ack, nr_cpus);
	wmb();
	WRITE_ONCE(state, new_state);
}

static void ack_state(void)
{
	if (!__atomic_sub_fetch(&thread_ack, 1, __ATOMIC_SEQ_CST))
		set_state(state + 1);
}

/* The frames from here down to the hypercall stand on a zeroed stack: their unused slots show
 * nothing of what this thread did before. */
static noinline void run_stopped(void)
{
	stack_scrub(end_of_stack(current));
	stop_ret = stop_fn(stop_data);
}

/* All CPUs in step. The waiting ones give their turn away, as they share a real one. */
static noinline void stop_cpu(void)
{
	int curstate = STOPMACHINE_NONE;

	while (curstate != STOPMACHINE_EXIT) {
		if (READ_ONCE(state) == curstate) {
			HYPERVISOR_sched_op(SCHEDOP_yield, NULL);
			continue;
		}
		curstate = READ_ONCE(state);
		if (curstate == STOPMACHINE_DISABLE_IRQ)
			local_irq_disable();
		else if (curstate == STOPMACHINE_RUN && this_cpu()->id == 0)
			run_stopped();
		if (curstate != STOPMACHINE_EXIT)
			ack_state();
	}
	local_irq_enable();
}

static int migration_thread(void *unused)
{
	int *wake = &wanted[this_cpu()->id];

	(void)unused;
	for (;;) {
		wait_event(&stop_waitq, READ_ONCE(*wake));
		WRITE_ONCE(*wake, 0);
		stop_cpu();
		if (!__atomic_sub_fetch(&running, 1, __ATOMIC_SEQ_CST))
			wake_up_all(&stop_waitq);
	}
	return 0;
}

/* Run fn(data) on CPU 0 with all CPUs stopped; returns what it returned. May sleep. */
int stop_machine(int (*fn)(void *), void *data)
{
	int ret, i;

	mutex_lock(&stop_mutex);
	stop_fn = fn;
	stop_data = data;
	running = nr_cpus;
	set_state(STOPMACHINE_PREPARE);
	for (i = 0; i < nr_cpus; i++)
		WRITE_ONCE(wanted[i], 1);
	wake_up_all(&stop_waitq);
	wait_event(&stop_waitq, !READ_ONCE(running));
	ret = stop_ret;
	mutex_unlock(&stop_mutex);
	return ret;
}

void stop_machine_init(void)
{
	struct cpu *cpu;
	char name[16];

	for_each_online_cpu(cpu) {
		snprintf(name, sizeof(name), "migration/%u", cpu->id);
		BUG_ON(!kthread_run_on(cpu, PRIO_STOP, migration_thread, NULL, PF_NOFREEZE, name));
	}
}
