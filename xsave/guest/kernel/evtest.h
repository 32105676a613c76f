/* evtest.h - event channels over a suspend. */
#ifndef XSAVE_GUEST_EVTEST_H
#define XSAVE_GUEST_EVTEST_H

void evtest_init(void);

#endif
