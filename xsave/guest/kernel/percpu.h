/*
 * percpu.h - what each vCPU has for itself, event masking, and preemption on and off.
 *
 * A thread belongs to one CPU for its life: this_cpu() is the same before and after any
 * preemption, and what only the threads of one CPU touch needs preemption off, no lock.
 */
#ifndef XSAVE_GUEST_PERCPU_H
#define XSAVE_GUEST_PERCPU_H

#include "kernel.h"
#include "layout.h"
#include "xen.h"

#define NR_CPUS 8

struct spinlock {
	u32 owner;			/* CPU number + 1; 0: free */
};
#define SPINLOCK { 0 }

/* Higher runs first; equals take turns. */
enum {
	PRIO_NORMAL,
	PRIO_SYSTEM,			/* what a suspend is made with: xenbus, xenwatch */
	PRIO_STOP,			/* migration/N: stop_machine() */
	NR_PRIOS,
};

struct runqueue {
	struct spinlock lock;
	struct list_head queue[NR_PRIOS];	/* runnable, not running */
	struct list_head sleepers;		/* asleep until a time */
	u64 nr_switches;
};

/* One per vCPU, found through the kernel GS base. */
struct cpu {
	struct cpu *self;		/* %gs:0 */
	struct task_struct *curr;	/* %gs:8 */
	int preempt_count;		/* > 0: this_cpu()'s task must not be switched away */
	int need_resched;		/* written under the runqueue's lock */
	struct vcpu_info *vcpu;		/* the one way to this vCPU's vcpu_info */
	int id;
	int online;
	struct task_struct *idle;
	struct mm_struct *active_mm;
	struct runqueue rq;
	u64 armed_at;			/* ktime the singleshot timer is set to; 0: not set */
	int resched_irq, call_irq;	/* IPIs to this CPU */
	struct mmuext_op new_baseptr;	/* switch_mm()'s request: its mfn never sees a stack */
};
_Static_assert(offsetof(struct cpu, curr) == CPU_CURR, "entry.S counts on it");
_Static_assert(offsetof(struct cpu, preempt_count) == CPU_PREEMPT_COUNT, "entry.S counts on it");
_Static_assert(offsetof(struct cpu, need_resched) == CPU_NEED_RESCHED, "entry.S counts on it");

extern struct cpu cpu_data[NR_CPUS];
extern int nr_cpus;

/* CPUs are brought up in order and stay. */
#define for_each_online_cpu(cpu)                                                \
	for (cpu = cpu_data; cpu < cpu_data + nr_cpus; cpu++)

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

/* Linux's three models of preemption. Here they are chosen at boot: preempt=. */
enum preempt_model {
	PREEMPT_NONE,			/* a thread leaves the CPU when it sleeps */
	PREEMPT_VOLUNTARY,		/* ... and at cond_resched() */
	PREEMPT_FULL,			/* ... and wherever an event finds it */
};
extern u32 preempt_model;

void preempt_schedule(void);

static inline void preempt_disable(void)
{
	this_cpu()->preempt_count++;
	barrier();
}

static inline void preempt_enable(void)
{
	struct cpu *cpu = this_cpu();

	barrier();
	if (!--cpu->preempt_count && unlikely(READ_ONCE(cpu->need_resched)))
		preempt_schedule();
}

/* "Interrupts" are Xen's event upcalls; the mask byte in vcpu_info is their IF. */
static inline int irqs_disabled(void)
{
	return READ_ONCE(this_cpu()->vcpu->evtchn_upcall_mask);
}

static inline void local_irq_disable(void)
{
	WRITE_ONCE(this_cpu()->vcpu->evtchn_upcall_mask, 1);
	barrier();
}

void local_irq_enable(void);

static inline int local_irq_save(void)
{
	int masked = irqs_disabled();

	local_irq_disable();
	return masked;
}

static inline void local_irq_restore(int masked)
{
	if (!masked)
		local_irq_enable();
}

/* Spinlocks keep preemption off; the waiting CPU gives the rest of its slice away. */
void spin_lock_contended(struct spinlock *lock);

static inline int spin_trylock_once(struct spinlock *lock)
{
	u32 expected = 0;

	return __atomic_compare_exchange_n(&lock->owner, &expected, this_cpu()->id + 1, 0,
					   __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static inline void spin_lock(struct spinlock *lock)
{
	preempt_disable();
	if (unlikely(!spin_trylock_once(lock)))
		spin_lock_contended(lock);
}

static inline void spin_unlock(struct spinlock *lock)
{
	__atomic_store_n(&lock->owner, 0, __ATOMIC_RELEASE);
	preempt_enable();
}

static inline int spin_lock_irqsave(struct spinlock *lock)
{
	int masked = local_irq_save();

	spin_lock(lock);
	return masked;
}

static inline void spin_unlock_irqrestore(struct spinlock *lock, int masked)
{
	__atomic_store_n(&lock->owner, 0, __ATOMIC_RELEASE);
	local_irq_restore(masked);
	preempt_enable();
}

#endif
