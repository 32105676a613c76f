/* time.h - the clock and the one timer. */
#ifndef XSAVE_GUEST_TIME_H
#define XSAVE_GUEST_TIME_H

#include "types.h"

void time_init(void);
void tick_resume(void);
u64 ktime_get(void);
u64 ktime_get_real(void);
void clock_check(void);
u64 ktime_to_system_time(u64 ktime);
void program_timer(int running);
void timekeeping_suspend(void);
void timekeeping_resume(void);

#endif
