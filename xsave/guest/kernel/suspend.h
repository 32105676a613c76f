/* suspend.h - do_suspend, and the commands that lead to it. */
#ifndef XSAVE_GUEST_SUSPEND_H
#define XSAVE_GUEST_SUSPEND_H

void do_suspend(void);
int setup_shutdown_watcher(void *unused);
void advertise_shutdown_features(void);

#endif
