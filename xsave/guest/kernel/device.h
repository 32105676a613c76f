/* device.h - what has a far end, and has to be quiet while the guest is suspended. */
#ifndef XSAVE_GUEST_DEVICE_H
#define XSAVE_GUEST_DEVICE_H

#include "kernel.h"

struct device {
	const char *name;
	int (*suspend)(void);		/* 0, or the error that ends the suspend */
	void (*resume)(void);		/* in a new domain */
	void (*cancel)(void);		/* in the same one: nothing was lost */
	void (*complete)(void);		/* in a new domain, with all threads running */
	struct list_head list;
};

void device_register(struct device *dev);
int dpm_suspend(void);
void dpm_resume(int cancelled);
void dpm_complete(void);

#endif
