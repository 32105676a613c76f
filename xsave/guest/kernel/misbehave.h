/* misbehave.h - threads that make trouble when the command line asks for it. */
#ifndef XSAVE_GUEST_MISBEHAVE_H
#define XSAVE_GUEST_MISBEHAVE_H

void misbehave_start(void);

#endif
