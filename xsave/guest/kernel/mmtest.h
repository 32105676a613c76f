/* mmtest.h - threads that make and destroy address spaces. */
#ifndef XSAVE_GUEST_MMTEST_H
#define XSAVE_GUEST_MMTEST_H

#include "types.h"

#define MMTEST_PAGES 80		/* memory one such thread needs, at most */
int mmtest_start(u32 nr_threads);

#endif
