/* freezer.h - bringing every thread to a place where it holds nothing of this host. */
#ifndef XSAVE_GUEST_FREEZER_H
#define XSAVE_GUEST_FREEZER_H

#include "sched.h"
#include "time.h"

extern int pm_freezing;
extern u32 freezing_flags;	/* PF_USER while only such threads are asked */
int freeze_processes(void);
int freeze_kernel_threads(void);
void thaw_processes(void);
void __refrigerator(void);
const char *freezer_failure(void);

/* Whether this thread is asked to freeze. */
static inline int freezing(void)
{
	return unlikely(READ_ONCE(pm_freezing)) && !(READ_ONCE(freezing_flags) & ~current->flags);
}

/*
 * Park here while the freezer asks for it. Belongs into the outermost function of a freezable
 * thread, which must itself hold no mfn and no pte: its frame and its callee-saved registers are
 * all of the thread that an image keeps. What deeper calls left below is wiped first, so that
 * no slot of a frame on the way into the refrigerator shows it again.
 */
static inline __attribute__((always_inline)) void try_to_freeze(void)
{
	if (freezing()) {
		stack_scrub(end_of_stack(current));
		__refrigerator();
	}
}

/* Sleep from the outermost function. Without the freezer, this is where suspend finds the thread:
 * the frames of the sleep must show nothing of what deeper calls left on the stack either. */
static inline __attribute__((always_inline)) void freezable_sleep_until(u64 ktime)
{
	stack_scrub(end_of_stack(current));
	sleep_until(ktime);
	try_to_freeze();
}

static inline __attribute__((always_inline)) void freezable_schedule_timeout(u64 ns)
{
	freezable_sleep_until(ktime_get() + ns);
}

#endif
