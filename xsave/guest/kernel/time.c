/*
 * time.c - the clocks (Xen's pvclock), kept right across hosts, and the singleshot timer.
 *
 * system_time of another host starts anywhere. ktime = system_time + an offset chosen at each
 * resume so that the clock goes on where it stopped; time spent suspended does not count.
 * No TSC value is kept: what stays in memory is ktime, which is virtual where the host's is.
 *
 * The wall clock is Xen's at boot and at each resume, and goes with ktime between: it makes up
 * for the time suspended, on whatever host that ends.
 */
#include "events.h"
#include "hypercall.h"
#include "pattern.h"
#include "sched.h"
#include "time.h"

#define TICK_NS (10 * NSEC_PER_MSEC)	/* how long a thread may run unasked */

static s64 clock_offset;	/* ktime - system time */
static u64 wall_offset;		/* wall clock - ktime */
static u64 suspended_at;
static u64 latest;		/* the latest ktime anybody has to remember */

static u64 rdtsc(void)
{
	u32 low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

static u64 scale_delta(u64 delta, u32 mul, s8 shift)
{
	delta = shift < 0 ? delta >> -shift : delta << shift;
	return (u64)((unsigned __int128)delta * mul >> 32);
}

/* Xen's system time in ns, by its page of factors; reread when Xen wrote meanwhile. */
static u64 xen_clocksource_read(void)
{
	volatile struct vcpu_time_info *src = &this_cpu()->vcpu->time;
	u32 version;
	u64 ns;

	do {
		version = src->version;
		rmb();
		ns = src->system_time + scale_delta(rdtsc() - src->tsc_timestamp,
						    src->tsc_to_system_mul, src->tsc_shift);
		rmb();
	} while (version & 1 || version != src->version);
	return ns;
}

/* Xen's wall clock in ns since 1970, at system time 0. */
static u64 xen_read_wallclock(void)
{
	volatile struct shared_info *src = HYPERVISOR_shared_info;
	u32 version;
	u64 ns;

	do {
		version = src->wc_version;
		rmb();
		ns = ((u64)src->wc_sec_hi << 32 | src->wc_sec) * NSEC_PER_SEC + src->wc_nsec;
		rmb();
	} while (version & 1 || version != src->wc_version);
	return ns;
}

/* Monotonic ns since boot, without the times of suspension. */
u64 ktime_get(void)
{
	return xen_clocksource_read() + clock_offset;
}

/* Wall clock, ns since 1970. */
u64 ktime_get_real(void)
{
	return ktime_get() + wall_offset;
}

u64 ktime_to_system_time(u64 ktime)
{
	return ktime - clock_offset;
}

/*
 * Set the singleshot timer to the next moment anything has to happen: the end of somebody's
 * sleep or, where a thread runs, its tick. Events masked. While a thread runs, a timer that is
 * set to something earlier is left alone: it comes here again.
 */
void program_timer(int running)
{
	struct vcpu_set_singleshot_timer timer = { 0 };
	struct cpu *cpu = this_cpu();
	u64 next = next_wakeup(), tick;

	if (running) {
		tick = ktime_get() + TICK_NS;
		next = next ? min(next, tick) : tick;
		if (cpu->armed_at && cpu->armed_at <= next)
			return;
	}
	if (next == cpu->armed_at)
		return;
	cpu->armed_at = next;
	if (!next) {
		HYPERVISOR_vcpu_op(VCPUOP_stop_singleshot_timer, cpu->id, NULL);
		return;
	}
	timer.timeout_abs_ns = ktime_to_system_time(next);
	if (HYPERVISOR_vcpu_op(VCPUOP_set_singleshot_timer, cpu->id, &timer))
		panic("set_singleshot_timer refused");
}

/* The timer may be a little early, as Xen rounds: then it is simply set again. */
static void timer_interrupt(void)
{
	struct cpu *cpu = this_cpu();

	cpu->armed_at = 0;
	sched_tick(ktime_get());
	if (cpu->curr != cpu->idle)
		program_timer(1);
}

/* What Xen's wall clock says now, our own says from now on. */
static void clock_was_set(void)
{
	wall_offset = xen_read_wallclock() - (u64)clock_offset;
}

/* The clock starts at 0 with the kernel. */
void time_init(void)
{
	struct cpu *cpu;

	clock_offset = -(s64)xen_clocksource_read();
	clock_was_set();
	for_each_online_cpu(cpu)
		bind_virq_to_irqhandler(VIRQ_TIMER, cpu->id, timer_interrupt);
}

/* Once a second: the clock has not gone back, whatever happened. clock=1 shows both clocks. */
void clock_check(void)
{
	u64 now = ktime_get();

	if (now < latest)
		check_failed("clock", latest - now);
	latest = now;
	if (cmdline_number("clock", 0))
		printk("CLOCK %lu %lu\n", now, now + wall_offset);
}

/* On each CPU: Xen has forgotten what this vCPU's timer was set to. Events masked. */
void tick_resume(void)
{
	struct cpu *cpu = this_cpu();

	cpu->armed_at = 0;
	program_timer(cpu->curr != cpu->idle);
}

void timekeeping_suspend(void)
{
	latest = suspended_at = ktime_get();
}

/* With this vCPU's time info of the new (or the same) host in place: go on from there. */
void timekeeping_resume(void)
{
	clock_offset = (s64)(suspended_at - xen_clocksource_read());
	clock_was_set();
	this_cpu()->armed_at = 0;
}
