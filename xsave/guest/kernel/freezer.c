/*
 * freezer.c - bring every thread to a place where it holds nothing of this host.
 *
 * Freezable threads meet try_to_freeze() in their outermost loop; asleep ones are woken to get
 * there. As in Linux, what runs like a process goes first and kernel threads, which may be
 * working for it, after that. PF_NOFREEZE threads are those a suspend is made with; they handle
 * no mfn. A thread that does not come within freeze_timeout= seconds is named, and all is thawed.
 */
#include "freezer.h"
#include "time.h"

#define FREEZE_TIMEOUT 20	/* seconds, unless the command line says otherwise */

int pm_freezing;
u32 freezing_flags;
static char failure[160];

/* What the last freeze failed with, for people. */
const char *freezer_failure(void)
{
	return failure;
}

/* try_to_freeze() found that it is our turn. */
noinline void __refrigerator(void)
{
	struct task_struct *task = current;

	WRITE_ONCE(task->flags, task->flags | PF_FROZEN);
	for (;;) {
		WRITE_ONCE(task->state, TASK_FROZEN);
		mb();
		if (!READ_ONCE(pm_freezing))
			break;
		schedule();
	}
	WRITE_ONCE(task->state, TASK_RUNNING);
	WRITE_ONCE(task->flags, task->flags & ~PF_FROZEN);
}

static int must_still_freeze(const struct task_struct *task)
{
	return !(READ_ONCE(task->flags) & (PF_NOFREEZE | PF_FROZEN)) &&
	       !(freezing_flags & ~task->flags);
}

/* Wake what sleeps, so that it comes to try_to_freeze(); returns how many are not there yet. */
static u32 wake_unfrozen(void)
{
	struct task_struct *task;
	u32 todo = 0;
	int masked = spin_lock_irqsave(&tasklist_lock);

	list_for_each_entry(task, &all_tasks, tasks) {
		if (!must_still_freeze(task))
			continue;
		todo++;
		if (READ_ONCE(task->state) == TASK_INTERRUPTIBLE)
			wake_up_process(task);
	}
	spin_unlock_irqrestore(&tasklist_lock, masked);
	return todo;
}

/* Linux's line, and all names that fit. */
static void name_unfrozen(u64 ns, u32 todo)
{
	u64 ms = ns / NSEC_PER_MSEC;
	struct task_struct *task;
	int masked, used;

	used = snprintf(failure, sizeof(failure),
			"Freezing of tasks failed after %lu.%03lu seconds "
			"(%u tasks refusing to freeze):", ms / 1000, ms % 1000, todo);
	masked = spin_lock_irqsave(&tasklist_lock);
	list_for_each_entry(task, &all_tasks, tasks)
		if (must_still_freeze(task))
			used += snprintf(failure + used, sizeof(failure) - used, " %s",
					 task->comm);
	spin_unlock_irqrestore(&tasklist_lock, masked);
	printk("%s\n", failure);
}

/* 0, or -XEN_EBUSY with everything thawed again. */
static int try_to_freeze_tasks(u32 flags)
{
	u64 timeout = cmdline_number("freeze_timeout", FREEZE_TIMEOUT) * NSEC_PER_SEC;
	u64 start = ktime_get(), elapsed;
	u32 todo;

	WRITE_ONCE(freezing_flags, flags);
	WRITE_ONCE(pm_freezing, 1);
	mb();
	while ((todo = wake_unfrozen()) != 0) {
		elapsed = ktime_get() - start;
		if (elapsed > timeout) {
			name_unfrozen(elapsed, todo);
			thaw_processes();
			return -XEN_EBUSY;
		}
		schedule_timeout(NSEC_PER_MSEC);
	}
	return 0;
}

int freeze_processes(void)
{
	return try_to_freeze_tasks(PF_USER);
}

/* After freeze_processes(). */
int freeze_kernel_threads(void)
{
	return try_to_freeze_tasks(0);
}

void thaw_processes(void)
{
	struct task_struct *task;
	int masked;

	WRITE_ONCE(pm_freezing, 0);
	mb();
	masked = spin_lock_irqsave(&tasklist_lock);
	list_for_each_entry(task, &all_tasks, tasks)
		if (READ_ONCE(task->state) == TASK_FROZEN)
			wake_up_process(task);
	spin_unlock_irqrestore(&tasklist_lock, masked);
}
