/*
 * wait.c - sleeping: on a condition, for a time, for a lock.
 */
#include "sched.h"
#include "time.h"

/* Join `wq` and count as asleep from now on; schedule() makes it true. */
void prepare_to_wait(struct wait_queue *wq)
{
	struct task_struct *task = current;
	int masked = spin_lock_irqsave(&wq->lock);

	if (list_empty(&task->wait))
		list_add_tail(&task->wait, &wq->head);
	WRITE_ONCE(task->state, TASK_INTERRUPTIBLE);
	mb();
	spin_unlock_irqrestore(&wq->lock, masked);
}

void finish_wait(struct wait_queue *wq)
{
	struct task_struct *task = current;
	int masked = spin_lock_irqsave(&wq->lock);

	WRITE_ONCE(task->state, TASK_RUNNING);
	list_del_init(&task->wait);
	spin_unlock_irqrestore(&wq->lock, masked);
}

void wake_up_all(struct wait_queue *wq)
{
	struct task_struct *task;
	int masked = spin_lock_irqsave(&wq->lock);

	list_for_each_entry(task, &wq->head, wait)
		wake_up_process(task);
	spin_unlock_irqrestore(&wq->lock, masked);
}

void schedule_timeout(u64 ns)
{
	sleep_until(ktime_get() + ns);
}

static int mutex_trylock(struct mutex *lock)
{
	struct task_struct *nobody = NULL;

	return __atomic_compare_exchange_n(&lock->owner, &nobody, current, 0, __ATOMIC_ACQUIRE,
					   __ATOMIC_RELAXED);
}

void mutex_lock(struct mutex *lock)
{
	wait_event(&lock->wq, mutex_trylock(lock));
}

void mutex_unlock(struct mutex *lock)
{
	__atomic_store_n(&lock->owner, NULL, __ATOMIC_RELEASE);
	wake_up_all(&lock->wq);
}
