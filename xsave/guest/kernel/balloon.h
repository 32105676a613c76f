/* balloon.h - more memory, or less. */
#ifndef XSAVE_GUEST_BALLOON_H
#define XSAVE_GUEST_BALLOON_H

void balloon_init(void);

#endif
