/* console.h - the console ring's life; printk is in kernel.h. */
#ifndef XSAVE_GUEST_CONSOLE_H
#define XSAVE_GUEST_CONSOLE_H

#include "types.h"

void console_early_init(void);
void console_remap(void);
void console_suspend(void);
void console_resume(void);
u64 console_pfn(void);
extern struct device console_device;

#endif
