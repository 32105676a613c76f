/*
 * sched.h - tasks, the per-CPU area, event masking, sleeping, the freezer.
 *
 * A task and its kernel stack are one aligned block of THREAD_SIZE bytes of guest memory, the
 * struct at the low end: whatever a thread was doing is in the image because its stack is.
 *
 * The symbol xsave_task_layout tells an observer where things are. Eight u64s: the offsets in
 * struct task_struct of comm (16 bytes), sp (saved while switched out), state (u32), flags (u32)
 * and the list node on the ring `all_tasks`; THREAD_SIZE; the size of the struct, where the stack
 * begins; the offset in struct cpu (a vCPU's kernel GS base) of the pointer to its current task.
 */
#ifndef XSAVE_GUEST_SCHED_H
#define XSAVE_GUEST_SCHED_H

#include "kernel.h"
#include "layout.h"
#include "xen.h"

enum task_state {
	TASK_RUNNING,
	TASK_INTERRUPTIBLE,	/* asleep; the freezer may wake it */
	TASK_FROZEN,		/* in the refrigerator: only thaw_processes() wakes it */
	TASK_DEAD,
};

#define PF_NOFREEZE 1u		/* needed for the suspend itself: never frozen */
#define PF_FROZEN 2u
#define PF_IDLE 4u

struct mm_struct;

struct task_struct {
	u64 sp;				/* entry.S: stack pointer while switched out */
	enum task_state state;
	u32 flags;
	int pid;
	char comm[16];
	struct mm_struct *mm;		/* NULL: a kernel thread, runs on init_mm */
	u64 wake_at;			/* ktime in ns; 0: no timeout */
	int (*fn)(void *arg);
	void *arg;
	struct list_head run_list;	/* in the runqueue while runnable and not running */
	struct list_head wait;		/* in a wait queue */
	struct list_head tasks;		/* in the list of all tasks */
	u64 magic;			/* damaged by a stack that grew too far */
};
_Static_assert(sizeof(struct task_struct) == TASK_STRUCT_SIZE, "entry.S counts on it");
_Static_assert(offsetof(struct task_struct, sp) == TASK_SP, "entry.S counts on it");
#define STACK_END_MAGIC 0x57ac6e9d57ac6e9dUL

/* One per vCPU, found through the kernel GS base. Only CPU 0 exists so far. */
struct cpu {
	struct cpu *self;		/* %gs:0 */
	struct task_struct *curr;	/* %gs:8 */
	struct vcpu_info *vcpu;		/* the one way to this vCPU's vcpu_info */
	int id;
	int preempt_count;		/* > 0: this_cpu()'s task must not be switched away */
	int need_resched;
	struct task_struct *idle;
	struct mm_struct *active_mm;
	struct list_head runqueue;
	u64 armed_at;			/* ktime the singleshot timer is set to; 0: not set */
	struct mmuext_op new_baseptr;	/* switch_mm()'s request: its mfn never sees a stack */
};

static inline struct cpu *this_cpu(void)
{
	struct cpu *cpu;

	__asm__ volatile("movq %%gs:0, %0" : "=r"(cpu));
	return cpu;
}

static inline struct task_struct *get_current(void)
{
	struct task_struct *task;

	__asm__ volatile("movq %%gs:8, %0" : "=r"(task));
	return task;
}
#define current get_current()

/* Lowest address of a task's stack proper: everything from here to its sp is dead. */
static inline void *end_of_stack(struct task_struct *task)
{
	return task + 1;
}

static inline void preempt_disable(void)
{
	this_cpu()->preempt_count++;
	barrier();
}

static inline void preempt_enable(void)
{
	barrier();
	this_cpu()->preempt_count--;
}

/* "Interrupts" are Xen's event upcalls; the mask byte in vcpu_info is their IF. */
static inline void local_irq_disable(void)
{
	WRITE_ONCE(this_cpu()->vcpu->evtchn_upcall_mask, 1);
	barrier();
}

void local_irq_enable(void);

static inline int local_irq_save(void)
{
	int masked = READ_ONCE(this_cpu()->vcpu->evtchn_upcall_mask);

	local_irq_disable();
	return masked;
}

static inline void local_irq_restore(int masked)
{
	if (!masked)
		local_irq_enable();
}

/* sched.c */
extern struct list_head all_tasks;
void sched_init(void);
struct task_struct *kthread_run(int (*fn)(void *), void *arg, u32 flags, const char *name);
void schedule(void);
void wake_up_process(struct task_struct *task);
void wake_expired_sleepers(u64 now);
u64 next_wakeup(void);
noreturn void cpu_idle(void);
void finish_switch(struct task_struct *prev);

static inline void cond_resched(void)
{
	if (READ_ONCE(this_cpu()->need_resched))
		schedule();
}

/* entry.S */
struct task_struct *__switch_to_asm(struct task_struct *prev, struct task_struct *next);
void ret_from_fork(void);
void stack_scrub(void *stack_end);

/* Threads asleep on a condition. wait.c */
struct wait_queue {
	struct list_head head;
};
#define WAIT_QUEUE(name) struct wait_queue name = { LIST_HEAD_INIT((name).head) }

void prepare_to_wait(struct wait_queue *wq);
void finish_wait(void);
void wake_up_all(struct wait_queue *wq);
void schedule_timeout(u64 ns);
void sleep_until(u64 ktime);

/* The state is set before the condition is looked at, so no wake-up falls between. */
#define wait_event(wq, condition)                                               \
	do {                                                                    \
		for (;;) {                                                      \
			prepare_to_wait(wq);                                    \
			if (condition)                                          \
				break;                                          \
			schedule();                                             \
		}                                                               \
		finish_wait();                                                  \
	} while (0)

struct mutex {
	struct task_struct *owner;
	struct wait_queue wq;
};
#define MUTEX(name) struct mutex name = { NULL, { LIST_HEAD_INIT((name).wq.head) } }
void mutex_lock(struct mutex *lock);
void mutex_unlock(struct mutex *lock);

/* freezer.c */
extern int pm_freezing;
int freeze_processes(void);
void thaw_processes(void);
void __refrigerator(void);
int stop_machine(int (*fn)(void *), void *arg);

/*
 * Park here while the freezer asks for it. Belongs into the outermost function of a freezable
 * thread, which must itself hold no mfn and no pte: its frame and its callee-saved registers are
 * all of the thread that an image keeps. What deeper calls left below is wiped first, so that
 * no slot of a frame on the way into the refrigerator shows it again.
 */
static inline __attribute__((always_inline)) void try_to_freeze(void)
{
	if (unlikely(READ_ONCE(pm_freezing))) {
		stack_scrub(end_of_stack(current));
		__refrigerator();
	}
}

#endif
