/* gdt.h - a descriptor table for each CPU. */
#ifndef XSAVE_GUEST_GDT_H
#define XSAVE_GUEST_GDT_H

#include "types.h"

#define GDT_ENTRIES 16

u64 gdt_alloc(void);
void gdt_init(void);
void gdt_check(void);

#endif
