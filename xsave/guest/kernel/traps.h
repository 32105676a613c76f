/* traps.h - the registers of what was interrupted, as entry.S lays them down. */
#ifndef XSAVE_GUEST_TRAPS_H
#define XSAVE_GUEST_TRAPS_H

#include "types.h"

struct pt_regs {
	u64 r15, r14, r13, r12, bp, bx;
	u64 r11, r10, r9, r8, ax, cx, dx, si, di;
	u64 error_code;
	u64 ip, cs, flags, sp, ss;
};

#endif
