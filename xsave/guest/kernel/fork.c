/*
 * fork.c - threads: made, listed, buried.
 */
#include "hypercall.h"
#include "mm.h"
#include "sched.h"

struct list_head all_tasks = LIST_HEAD_INIT(all_tasks);
struct spinlock tasklist_lock;

/* For whoever looks at this kernel from outside; sched.h says what each is. */
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

const u64 xsave_cpu_layout[] __attribute__((used)) = {
	sizeof(struct cpu),
	offsetof(struct cpu, id),
	offsetof(struct cpu, curr),
	offsetof(struct cpu, preempt_count),
	offsetof(struct cpu, rq.nr_switches),
};

static int next_pid;
static void *free_stacks;	/* blocks of dead threads, linked by their first word */

static struct task_struct *init_task(void *block, struct cpu *cpu, const char *name, u32 flags)
{
	struct task_struct *task = block;
	int masked;

	snprintf(task->comm, sizeof(task->comm), "%s", name);
	task->cpu = cpu;
	task->flags = flags;
	task->state = TASK_RUNNING;
	task->magic = STACK_END_MAGIC;
	INIT_LIST_HEAD(&task->run_list);
	INIT_LIST_HEAD(&task->sleep_list);
	INIT_LIST_HEAD(&task->wait);
	masked = spin_lock_irqsave(&tasklist_lock);
	task->pid = flags & PF_IDLE ? 0 : ++next_pid;
	list_add_tail(&task->tasks, &all_tasks);
	spin_unlock_irqrestore(&tasklist_lock, masked);
	return task;
}

/* The thread a CPU comes up with; it becomes the one that idles (pid 0). */
struct task_struct *idle_init(struct cpu *cpu, void *block)
{
	char name[16];

	snprintf(name, sizeof(name), "swapper/%u", cpu->id);
	cpu->idle = init_task(block, cpu, name, PF_NOFREEZE | PF_IDLE);
	cpu->idle->on_rq = 1;
	return cpu->idle;
}

static void *alloc_thread(void)
{
	int masked = spin_lock_irqsave(&tasklist_lock);
	void *block = free_stacks;

	if (block) {
		free_stacks = *(void **)block;
		*(void **)block = NULL;
	}
	spin_unlock_irqrestore(&tasklist_lock, masked);
	return block ? block : alloc_pages_contiguous(THREAD_PAGES);
}

/* Start a kernel thread on `cpu`, where it stays; NULL when there is no memory for it. */
struct task_struct *kthread_run_on(struct cpu *cpu, int prio, int (*fn)(void *), void *arg,
				   u32 flags, const char *name)
{
	struct task_struct *task = alloc_thread();
	u64 *sp;

	if (!task)
		return NULL;
	init_task(task, cpu, name, flags);
	task->prio = prio;
	task->fn = fn;
	task->arg = arg;
	/* What __switch_to_asm pops: six registers of zero, and where to return to. */
	sp = (u64 *)((char *)task + THREAD_SIZE) - 2;
	*--sp = (u64)ret_from_fork;
	task->sp = (u64)(sp - 6);
	activate_task(task);
	return task;
}

/* On this CPU; the threads a suspend is made with go before all others. */
struct task_struct *kthread_run(int (*fn)(void *), void *arg, u32 flags, const char *name)
{
	int prio = flags & PF_NOFREEZE ? PRIO_SYSTEM : PRIO_NORMAL;

	return kthread_run_on(this_cpu(), prio, fn, arg, flags, name);
}

/* Called by every thread as its first act after it was switched to. Events masked. */
void finish_switch(struct task_struct *prev)
{
	if (prev->state != TASK_DEAD)
		return;
	spin_lock(&tasklist_lock);
	list_del_init(&prev->tasks);
	memset(prev, 0, THREAD_SIZE);
	*(void **)prev = free_stacks;
	free_stacks = prev;
	spin_unlock(&tasklist_lock);
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
