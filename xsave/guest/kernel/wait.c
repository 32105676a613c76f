/*
 * wait.c - sleeping: on a condition, for a time, for a lock.
 */
#include "sched.h"
#include "time.h"

/* Join `wq` and count as asleep from now on; schedule() makes it true. */
void prepare_to_wait(struct wait_queue *wq)
{
	struct task_struct *task = current;
	int masked = local_irq_save();

	if (list_empty(&task->wait))
		list_add_tail(&task->wait, &wq->head);
	task->state = TASK_INTERRUPTIBLE;
	local_irq_restore(masked);
}

void finish_wait(void)
{
	struct task_struct *task = current;
	int masked = local_irq_save();

	task->state = TASK_RUNNING;
	list_del_init(&task->wait);
	local_irq_restore(masked);
}

void wake_up_all(struct wait_queue *wq)
{
	struct task_struct *task;
	int masked = local_irq_save();

	list_for_each_entry(task, &wq->head, wait)
		wake_up_process(task);
	local_irq_restore(masked);
}

/* Sleep until the clock shows `ktime`, or the freezer wakes us before. */
void sleep_until(u64 ktime)
{
	struct task_struct *task = current;

	local_irq_disable();
	task->wake_at = ktime;
	task->state = TASK_INTERRUPTIBLE;
	local_irq_enable();
	schedule();
}

void schedule_timeout(u64 ns)
{
	sleep_until(ktime_get() + ns);
}

void mutex_lock(struct mutex *lock)
{
	wait_event(&lock->wq, !lock->owner);
	lock->owner = current;
}

void mutex_unlock(struct mutex *lock)
{
	lock->owner = NULL;
	wake_up_all(&lock->wq);
}
