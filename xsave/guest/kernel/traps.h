/* traps.h - the registers of what was interrupted, as entry.S lays them down. */
#ifndef XSAVE_GUEST_TRAPS_H
#define XSAVE_GUEST_TRAPS_H

#include "layout.h"
#include "types.h"

struct pt_regs {
	u64 r15, r14, r13, r12, bp, bx;
	u64 r11, r10, r9, r8, ax, cx, dx, si, di;
	u64 error_code;
	u64 ip, cs, flags, sp, ss;
};

struct trap_info;
void trap_copy_table(struct trap_info *table);

_Static_assert(offsetof(struct pt_regs, flags) == PT_REGS_FLAGS, "entry.S counts on it");

#endif
