/*
 * sched.c - the scheduler: a runqueue per CPU, the highest priority first, equals in turn.
 *
 * A thread leaves the CPU when it sleeps; when, with preempt=voluntary, it meets cond_resched();
 * and with preempt=full wherever an event finds it, unless it is between preempt_disable() and
 * _enable(). In each case something must have set need_resched: a tick while an equal waits, or
 * the waking of a thread of higher priority.
 */
#include "hypercall.h"
#include "mm.h"
#include "sched.h"
#include "smp.h"
#include "time.h"

extern char init_stack[];

u32 preempt_model = PREEMPT_FULL;

void sched_init_cpu(struct cpu *cpu)
{
	int prio;

	for (prio = 0; prio < NR_PRIOS; prio++)
		INIT_LIST_HEAD(&cpu->rq.queue[prio]);
	INIT_LIST_HEAD(&cpu->rq.sleepers);
	cpu->active_mm = &init_mm;
}

/* The thread that booted becomes CPU 0's idle thread. */
void sched_init(void)
{
	struct cpu *cpu = this_cpu();

	if (cmdline_is("preempt", "none"))
		preempt_model = PREEMPT_NONE;
	else if (cmdline_is("preempt", "voluntary"))
		preempt_model = PREEMPT_VOLUNTARY;
	sched_init_cpu(cpu);
	cpu->curr = idle_init(cpu, init_stack);
}

/* The kernel stack Xen would use on entry from user mode, and the address space, change first. */
static void context_switch(struct task_struct *prev, struct task_struct *next)
{
	switch_mm(next->mm ? next->mm : &init_mm);
	HYPERVISOR_stack_switch(FLAT_RING3_SS64, (u64)next + THREAD_SIZE);
	finish_switch(__switch_to_asm(prev, next));
}

static struct task_struct *pick_next_task(struct cpu *cpu)
{
	struct list_head *queue;
	struct task_struct *next;
	int prio;

	for (prio = NR_PRIOS - 1; prio >= 0; prio--) {
		queue = &cpu->rq.queue[prio];
		if (list_empty(queue))
			continue;
		next = container_of(queue->next, struct task_struct, run_list);
		list_del_init(&next->run_list);
		return next;
	}
	return cpu->idle;
}

/*
 * Give the CPU to whoever is to run; the idle thread runs when there is none. Events masked.
 * A preempted thread stays runnable in any state: it may have been on its way to sleep, and the
 * condition it sleeps on may be true already.
 */
static void __schedule(int preempted)
{
	struct cpu *cpu = this_cpu();
	struct task_struct *prev = cpu->curr, *next;

	BUG_ON(cpu->preempt_count);
	BUG_ON(prev->magic != STACK_END_MAGIC);
	spin_lock(&cpu->rq.lock);
	cpu->need_resched = 0;
	if (!preempted && prev->state != TASK_RUNNING)
		prev->on_rq = 0;
	else if (prev != cpu->idle)
		list_add_tail(&prev->run_list, &cpu->rq.queue[prev->prio]);
	/* Under the lock: a waker on another CPU looks whom it has to displace. */
	next = cpu->curr = pick_next_task(cpu);
	cpu->rq.nr_switches += next != prev;
	spin_unlock(&cpu->rq.lock);
	if (next != cpu->idle)
		program_timer(1);
	if (next != prev)
		context_switch(prev, next);
}

void schedule(void)
{
	int masked = local_irq_save();

	__schedule(0);
	local_irq_restore(masked);
}

/* entry.S: on the way out of an event, on the stack of what it interrupted. Events masked. */
void preempt_schedule_irq(void)
{
	if (preempt_model == PREEMPT_FULL && current != this_cpu()->idle)
		__schedule(1);
}

/* preempt_enable(): an event came meanwhile, or a wake-up, and had to leave the thread be. */
void preempt_schedule(void)
{
	if (preempt_model != PREEMPT_FULL || irqs_disabled() || current == this_cpu()->idle)
		return;
	local_irq_disable();
	__schedule(1);
	local_irq_enable();
}

/* A place to be preempted at, of one's own will. */
void cond_resched(void)
{
	if (preempt_model == PREEMPT_NONE || !READ_ONCE(this_cpu()->need_resched))
		return;
	local_irq_disable();
	__schedule(1);
	local_irq_enable();
}

/* With the lock of the task's runqueue, and events masked. */
static void resched_task_of(struct cpu *cpu)
{
	cpu->need_resched = 1;
	if (cpu != this_cpu())
		smp_send_reschedule(cpu);
}

static void enqueue_task(struct cpu *cpu, struct task_struct *task)
{
	task->on_rq = 1;
	list_add_tail(&task->run_list, &cpu->rq.queue[task->prio]);
	if (cpu->curr == cpu->idle || task->prio > cpu->curr->prio)
		resched_task_of(cpu);
}

static void wake_up_locked(struct cpu *cpu, struct task_struct *task)
{
	if (task->state == TASK_RUNNING || task->state == TASK_DEAD)
		return;
	task->state = TASK_RUNNING;
	task->wake_at = 0;
	list_del_init(&task->sleep_list);
	if (!task->on_rq)
		enqueue_task(cpu, task);
}

/* A new thread. */
void activate_task(struct task_struct *task)
{
	struct cpu *cpu = task->cpu;
	int masked = spin_lock_irqsave(&cpu->rq.lock);

	enqueue_task(cpu, task);
	spin_unlock_irqrestore(&cpu->rq.lock, masked);
}

void wake_up_process(struct task_struct *task)
{
	struct cpu *cpu = task->cpu;
	int masked = spin_lock_irqsave(&cpu->rq.lock);

	wake_up_locked(cpu, task);
	spin_unlock_irqrestore(&cpu->rq.lock, masked);
}

/* Sleep until the clock shows `ktime`, or the freezer wakes us before. */
void sleep_until(u64 ktime)
{
	struct cpu *cpu = this_cpu();
	struct task_struct *task = current;
	int masked = spin_lock_irqsave(&cpu->rq.lock);

	task->state = TASK_INTERRUPTIBLE;
	task->wake_at = ktime;
	list_add_tail(&task->sleep_list, &cpu->rq.sleepers);
	spin_unlock_irqrestore(&cpu->rq.lock, masked);
	schedule();
}

/* The earliest ktime a thread of this CPU wants to be woken at; 0: none does. Events masked. */
u64 next_wakeup(void)
{
	struct runqueue *rq = &this_cpu()->rq;
	struct task_struct *task;
	u64 first = 0;

	spin_lock(&rq->lock);
	list_for_each_entry(task, &rq->sleepers, sleep_list)
		if (!first || task->wake_at < first)
			first = task->wake_at;
	spin_unlock(&rq->lock);
	return first;
}

/* The timer event: wake who slept until now, and let equals take turns. */
void sched_tick(u64 now)
{
	struct cpu *cpu = this_cpu();
	struct list_head *at, *next;
	struct task_struct *task;

	spin_lock(&cpu->rq.lock);
	for (at = cpu->rq.sleepers.next; at != &cpu->rq.sleepers; at = next) {
		next = at->next;
		task = container_of(at, struct task_struct, sleep_list);
		if (task->wake_at <= now)
			wake_up_locked(cpu, task);
	}
	if (cpu->curr != cpu->idle && !list_empty(&cpu->rq.queue[cpu->curr->prio]))
		cpu->need_resched = 1;
	spin_unlock(&cpu->rq.lock);
}

u64 nr_context_switches(void)
{
	struct cpu *cpu;
	u64 sum = 0;

	for_each_online_cpu(cpu)
		sum += READ_ONCE(cpu->rq.nr_switches);
	return sum;
}

/*
 * The idle thread: nothing to run, so block until an event. SCHEDOP_block unmasks events in the
 * same act, so that none can come between the look at the runqueue and the sleep.
 */
noreturn void cpu_idle(void)
{
	struct cpu *cpu = this_cpu();

	stack_scrub(end_of_stack(cpu->idle));
	for (;;) {
		local_irq_disable();
		if (!READ_ONCE(cpu->need_resched)) {
			program_timer(0);
			HYPERVISOR_sched_op(SCHEDOP_block, NULL);
		}
		local_irq_enable();
		schedule();
	}
}

/* Somebody on another CPU has the lock. All CPUs may share one real one: let that one run. */
noinline void spin_lock_contended(struct spinlock *lock)
{
	BUG_ON(READ_ONCE(lock->owner) == (u32)this_cpu()->id + 1);
	do
		HYPERVISOR_sched_op(SCHEDOP_yield, NULL);
	while (READ_ONCE(lock->owner) || !spin_trylock_once(lock));
}
