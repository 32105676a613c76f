/*
 * misbehave.c - threads that are no good citizens, for those who want to see what becomes of it.
 *
 * stubborn=1: a thread that sleeps and wakes for ever and never looks whether it should freeze.
 * spin=SECONDS: a thread that sleeps a second and then keeps CPU 0 for so long, in turn, without
 * a call of the scheduler: only preemption at any instruction helps against it.
 */
#include "freezer.h"
#include "misbehave.h"
#include "time.h"

static int stubborn_thread(void *unused)
{
	(void)unused;
	for (;;)
		schedule_timeout(10 * NSEC_PER_MSEC);
	return 0;
}

/* Without a hypercall, so that nothing but an interruption can end it early. */
static noinline void spin_until(u64 end)
{
	volatile u32 n;

	while (ktime_get() < end)
		for (n = 0; n < 10000; n++)
			;
}

static int spinner_thread(void *unused)
{
	u64 ns = cmdline_number("spin", 0) * NSEC_PER_SEC;

	(void)unused;
	for (;;) {
		freezable_schedule_timeout(NSEC_PER_SEC);
		printk("SPIN begins\n");
		spin_until(ktime_get() + ns);
		printk("SPIN ends\n");
	}
	return 0;
}

void misbehave_start(void)
{
	if (cmdline_number("stubborn", 0))
		BUG_ON(!kthread_run(stubborn_thread, NULL, 0, "stubborn"));
	if (cmdline_number("spin", 0))
		BUG_ON(!kthread_run(spinner_thread, NULL, 0, "spinner"));
}
