/*
 * freezer.c - bring every thread to a place where it holds nothing of this host.
 *
 * Freezable threads meet try_to_freeze() in their outermost loop; asleep ones are woken to get
 * there. PF_NOFREEZE threads are those a suspend is made with; they handle no mfn.
 */
#include "sched.h"
#include "time.h"

#define FREEZE_TIMEOUT (20 * NSEC_PER_SEC)

int pm_freezing;

/* try_to_freeze() found the flag up. */
noinline void __refrigerator(void)
{
	struct task_struct *task = current;

	task->flags |= PF_FROZEN;
	while (READ_ONCE(pm_freezing)) {
		task->state = TASK_FROZEN;
		schedule();
	}
	task->flags &= ~PF_FROZEN;
}

/* Wake what sleeps, so that it comes to try_to_freeze(); returns how many are not there yet. */
static u32 try_to_freeze_tasks(void)
{
	struct task_struct *task;
	u32 todo = 0;

	list_for_each_entry(task, &all_tasks, tasks) {
		if (task->flags & (PF_NOFREEZE | PF_FROZEN))
			continue;
		todo++;
		if (task->state == TASK_INTERRUPTIBLE)
			wake_up_process(task);
	}
	return todo;
}

static void show_unfrozen(void)
{
	struct task_struct *task;

	list_for_each_entry(task, &all_tasks, tasks)
		if (!(task->flags & (PF_NOFREEZE | PF_FROZEN)))
			printk("refuses to freeze: %s (%d)\n", task->comm, task->pid);
}

/* 0, or -XEN_EBUSY with everything thawed again. */
int freeze_processes(void)
{
	u64 deadline = ktime_get() + FREEZE_TIMEOUT;

	WRITE_ONCE(pm_freezing, 1);
	while (try_to_freeze_tasks()) {
		if (ktime_get() > deadline) {
			show_unfrozen();
			thaw_processes();
			return -XEN_EBUSY;
		}
		schedule_timeout(NSEC_PER_MSEC);
	}
	return 0;
}

void thaw_processes(void)
{
	struct task_struct *task;

	WRITE_ONCE(pm_freezing, 0);
	list_for_each_entry(task, &all_tasks, tasks)
		if (task->state == TASK_FROZEN)
			wake_up_process(task);
}

/* Run fn with nothing else running on any CPU. With one CPU, events off is all it takes. */
int stop_machine(int (*fn)(void *), void *arg)
{
	int masked = local_irq_save();
	int ret = fn(arg);

	local_irq_restore(masked);
	return ret;
}
