/*
 * sched.h - tasks, sleeping and waking, wait queues and mutexes.
 *
 * A task and its kernel stack are one aligned block of THREAD_SIZE bytes of guest memory, the
 * struct at the low end: whatever a thread was doing is in the image because its stack is.
 *
 * The symbol xsave_task_layout tells an observer where things are. Eight u64s: the offsets in
 * struct task_struct of comm (16 bytes), sp (saved while switched out), state (u32), flags (u32)
 * and the list node on the ring `all_tasks`; THREAD_SIZE; the size of the struct, where the stack
 * begins; the offset in struct cpu (a vCPU's kernel GS base) of the pointer to its current task.
 * And xsave_cpu_layout, of the array `cpu_data`: the size of struct cpu, the offsets in it of id,
 * curr, preempt_count (u32) and rq.nr_switches (u64).
 */
#ifndef XSAVE_GUEST_SCHED_H
#define XSAVE_GUEST_SCHED_H

#include "percpu.h"

enum task_state {
	TASK_RUNNING,
	TASK_INTERRUPTIBLE,	/* asleep; the freezer may wake it */
	TASK_FROZEN,		/* in the refrigerator: only thaw_processes() wakes it */
	TASK_DEAD,
};

#define PF_NOFREEZE 1u		/* needed for the suspend itself: never frozen */
#define PF_FROZEN 2u
#define PF_IDLE 4u
#define PF_USER 8u		/* lives in address spaces of its own, as a process does */

struct mm_struct;

struct task_struct {
	u64 sp;				/* entry.S: stack pointer while switched out */
	enum task_state state;
	u32 flags;
	int pid;
	int prio;
	int on_rq;			/* runnable, whatever `state` says: running or queued */
	int pad;
	struct cpu *cpu;		/* the only one it runs on */
	char comm[16];
	struct mm_struct *mm;		/* NULL: a kernel thread, runs on init_mm */
	u64 wake_at;			/* ktime in ns; 0: no timeout */
	int (*fn)(void *arg);
	void *arg;
	struct list_head run_list;	/* in the runqueue while runnable and not running */
	struct list_head sleep_list;	/* in the runqueue's sleepers while wake_at is set */
	struct list_head wait;		/* in a wait queue */
	struct list_head tasks;		/* in the list of all tasks */
	u64 magic;			/* damaged by a stack that grew too far */
};
_Static_assert(sizeof(struct task_struct) == TASK_STRUCT_SIZE, "entry.S counts on it");
_Static_assert(offsetof(struct task_struct, sp) == TASK_SP, "entry.S counts on it");
#define STACK_END_MAGIC 0x57ac6e9d57ac6e9dUL

/* Lowest address of a task's stack proper: everything from here to its sp is dead. */
static inline void *end_of_stack(struct task_struct *task)
{
	return task + 1;
}

/* fork.c */
extern struct list_head all_tasks;
extern struct spinlock tasklist_lock;
void fork_init(void);
struct task_struct *idle_init(struct cpu *cpu, void *block);
struct task_struct *kthread_run(int (*fn)(void *), void *arg, u32 flags, const char *name);
struct task_struct *kthread_run_on(struct cpu *cpu, int prio, int (*fn)(void *), void *arg,
				   u32 flags, const char *name);
void finish_switch(struct task_struct *prev);

/* sched.c */
void sched_init(void);
void sched_init_cpu(struct cpu *cpu);
void activate_task(struct task_struct *task);
void schedule(void);
void cond_resched(void);
void wake_up_process(struct task_struct *task);
void sleep_until(u64 ktime);
void sched_tick(u64 now);
u64 next_wakeup(void);
u64 nr_context_switches(void);
noreturn void cpu_idle(void);

/* entry.S */
struct task_struct *__switch_to_asm(struct task_struct *prev, struct task_struct *next);
void ret_from_fork(void);
void stack_scrub(void *stack_end);

/* Threads asleep on a condition. wait.c */
struct wait_queue {
	struct spinlock lock;
	struct list_head head;
};
#define WAIT_QUEUE(name) struct wait_queue name = { SPINLOCK, LIST_HEAD_INIT((name).head) }

void prepare_to_wait(struct wait_queue *wq);
void finish_wait(struct wait_queue *wq);
void wake_up_all(struct wait_queue *wq);
void schedule_timeout(u64 ns);

/* The state is set before the condition is looked at, so no wake-up falls between. */
#define wait_event(wq, condition)                                               \
	do {                                                                    \
		for (;;) {                                                      \
			prepare_to_wait(wq);                                    \
			if (condition)                                          \
				break;                                          \
			schedule();                                             \
		}                                                               \
		finish_wait(wq);                                                \
	} while (0)

struct mutex {
	struct task_struct *owner;
	struct wait_queue wq;
};
#define MUTEX(name) struct mutex name = { NULL, { SPINLOCK, LIST_HEAD_INIT((name).wq.head) } }
void mutex_lock(struct mutex *lock);
void mutex_unlock(struct mutex *lock);

#endif
