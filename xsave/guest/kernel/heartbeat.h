/* heartbeat.h - a thread that notices when it was kept waiting. */
#ifndef XSAVE_GUEST_HEARTBEAT_H
#define XSAVE_GUEST_HEARTBEAT_H

void heartbeat_start(void);

#endif
