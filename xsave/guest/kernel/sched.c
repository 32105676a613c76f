/*
 * sched.c - the scheduler: one runqueue, first in first out, switching at schedule() only.
 *
 * A thread runs until it sleeps or meets cond_resched() after a timer tick has set need_resched.
 * Preemption at any instruction needs one more call of schedule(), on the way out of an event
 * (entry.S): all that must not be interrupted so is between preempt_disable() and _enable().
 */
#include "hypercall.h"
#include "mm.h"
#include "sched.h"
#include "time.h"

extern char init_stack[];

struct list_head all_tasks = LIST_HEAD_INIT(all_tasks);
static int next_pid = 1;

/* For whoever looks at this kernel from outside (sched.h says what each is). */
const u64 xsave_task_layout[] __attribute__((used)) = {
	offsetof(struct task_struct, comm),
	offsetof(struct task_struct, sp),
	offsetof(struct task_struct, state),
	offsetof(struct task_struct, flags),
	offsetof(struct task_struct, tasks),
	THREAD_SIZE,
	TASK_STRUCT_SIZE,
	offsetof(struct cpu, curr),
};

static void *free_stacks;	/* blocks of dead threads, linked by their first word */

static struct task_struct *init_task(void *block, const char *name, u32 flags)
{
	struct task_struct *task = block;

	snprintf(task->comm, sizeof(task->comm), "%s", name);
	task->flags = flags;
	task->state = TASK_RUNNING;
	task->magic = STACK_END_MAGIC;
	INIT_LIST_HEAD(&task->run_list);
	INIT_LIST_HEAD(&task->wait);
	list_add_tail(&task->tasks, &all_tasks);
	return task;
}

/* The thread that booted becomes CPU 0's idle thread (pid 0). */
void sched_init(void)
{
	struct cpu *cpu = this_cpu();

	INIT_LIST_HEAD(&cpu->runqueue);
	cpu->idle = cpu->curr = init_task(init_stack, "swapper", PF_NOFREEZE | PF_IDLE);
	cpu->active_mm = &init_mm;
}

static void *alloc_thread(void)
{
	void *block;

	preempt_disable();
	block = free_stacks;
	if (block) {
		free_stacks = *(void **)block;
		*(void **)block = NULL;
	}
	preempt_enable();
	return block ? block : alloc_pages_contiguous(THREAD_PAGES);
}

/* Start a kernel thread; NULL when there is no memory for it. */
struct task_struct *kthread_run(int (*fn)(void *), void *arg, u32 flags, const char *name)
{
	struct task_struct *task = alloc_thread();
	u64 *sp;
	int masked;

	if (!task)
		return NULL;
	masked = local_irq_save();
	init_task(task, name, flags);
	task->pid = next_pid++;
	task->fn = fn;
	task->arg = arg;
	/* What __switch_to_asm pops: six registers of zero, and where to return to. */
	sp = (u64 *)((char *)task + THREAD_SIZE) - 2;
	*--sp = (u64)ret_from_fork;
	task->sp = (u64)(sp - 6);
	list_add_tail(&task->run_list, &this_cpu()->runqueue);
	local_irq_restore(masked);
	return task;
}

/* Called by every thread as its first act after it was switched to. */
void finish_switch(struct task_struct *prev)
{
	if (prev->state != TASK_DEAD)
		return;
	list_del_init(&prev->tasks);
	memset(prev, 0, THREAD_SIZE);
	*(void **)prev = free_stacks;
	free_stacks = prev;
}

/* entry.S, ret_from_fork */
noreturn void kthread_entry(struct task_struct *prev)
{
	struct task_struct *task;

	finish_switch(prev);
	local_irq_enable();
	task = current;
	task->fn(task->arg);
	local_irq_disable();
	task->state = TASK_DEAD;
	schedule();
	panic("a dead thread ran");
}

/* The kernel stack Xen would use on entry from user mode, and the address space, change first. */
static void context_switch(struct task_struct *prev, struct task_struct *next)
{
	switch_mm(next->mm ? next->mm : &init_mm);
	HYPERVISOR_stack_switch(FLAT_RING3_SS64, (u64)next + THREAD_SIZE);
	this_cpu()->curr = next;
	finish_switch(__switch_to_asm(prev, next));
}

/* Give the CPU to the next runnable thread; the idle thread runs when there is none. */
void schedule(void)
{
	struct cpu *cpu = this_cpu();
	struct task_struct *prev = cpu->curr, *next = cpu->idle;
	int masked = local_irq_save();

	BUG_ON(cpu->preempt_count);
	BUG_ON(prev->magic != STACK_END_MAGIC);
	cpu->need_resched = 0;
	if (prev->state == TASK_RUNNING && prev != cpu->idle)
		list_add_tail(&prev->run_list, &cpu->runqueue);
	if (!list_empty(&cpu->runqueue)) {
		next = container_of(cpu->runqueue.next, struct task_struct, run_list);
		list_del_init(&next->run_list);
	}
	if (next != cpu->idle)
		program_timer(1);
	if (next != prev)
		context_switch(prev, next);
	local_irq_restore(masked);
}

void wake_up_process(struct task_struct *task)
{
	int masked = local_irq_save();

	if (task->state != TASK_RUNNING && task->state != TASK_DEAD) {
		task->state = TASK_RUNNING;
		task->wake_at = 0;
		if (task != current)
			list_add_tail(&task->run_list, &this_cpu()->runqueue);
	}
	local_irq_restore(masked);
}

/* The earliest ktime a sleeping thread wants to be woken at; 0: none does. Events masked. */
u64 next_wakeup(void)
{
	struct task_struct *task;
	u64 first = 0;

	list_for_each_entry(task, &all_tasks, tasks)
		if (task->wake_at && (!first || task->wake_at < first))
			first = task->wake_at;
	return first;
}

void wake_expired_sleepers(u64 now)
{
	struct task_struct *task;

	list_for_each_entry(task, &all_tasks, tasks)
		if (task->wake_at && task->wake_at <= now)
			wake_up_process(task);
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
		if (list_empty(&cpu->runqueue)) {
			program_timer(0);
			HYPERVISOR_sched_op(SCHEDOP_block, NULL);
		}
		local_irq_enable();
		schedule();
	}
}
