/*
 * device.c - quiesce and resume, in the order of the device list.
 *
 * Devices are registered parents first, so they suspend from the end of the list and resume from
 * its start. One that cannot suspend stops the whole: those already asleep are woken as if the
 * suspend had been cancelled.
 */
#include "device.h"

static struct list_head dpm_list = LIST_HEAD_INIT(dpm_list);

void device_register(struct device *dev)
{
	list_add_tail(&dev->list, &dpm_list);
}

/* Wake `dev` and all behind it. */
static void resume_from(struct list_head *at, int cancelled)
{
	for (; at != &dpm_list; at = at->next) {
		struct device *dev = container_of(at, struct device, list);
		void (*wake)(void) = cancelled ? dev->cancel : dev->resume;

		if (wake)
			wake();
	}
}

int dpm_suspend(void)
{
	struct list_head *at;
	int rc;

	for (at = dpm_list.prev; at != &dpm_list; at = at->prev) {
		struct device *dev = container_of(at, struct device, list);

		rc = dev->suspend ? dev->suspend() : 0;
		if (!rc)
			continue;
		printk("device %s failed to suspend: error %d\n", dev->name, rc);
		resume_from(at->next, 1);
		return rc;
	}
	return 0;
}

void dpm_resume(int cancelled)
{
	resume_from(dpm_list.next, cancelled);
}

void dpm_complete(void)
{
	struct list_head *at;

	for (at = dpm_list.next; at != &dpm_list; at = at->next) {
		struct device *dev = container_of(at, struct device, list);

		if (dev->complete)
			dev->complete();
	}
}
