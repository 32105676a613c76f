/* pattern.h - the memory that proves itself. */
#ifndef XSAVE_GUEST_PATTERN_H
#define XSAVE_GUEST_PATTERN_H

#include "types.h"

u64 pattern_size(void);
void pattern_init(u64 first_pfn, u64 nr_pages);
int ticker_thread(void *unused);
int checker_thread(void *unused);
noreturn void check_failed(const char *what, u64 where);

#endif
