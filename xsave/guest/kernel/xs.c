/*
 * xs.c - xenstore requests, one at a time, and watches.
 */
#include "device.h"
#include "kernel.h"
#include "sched.h"
#include "xenbus.h"

static MUTEX(xs_lock);		/* held around a request, and from suspend to resume */
static struct xenbus_watch *watches;
static WAIT_QUEUE(watch_waitq);

/* What xenstored's error text means to us. */
static int xs_error(const struct xenbus_reply *reply)
{
	return strcmp(reply->body, "EAGAIN") ? -XS_EINVAL : -XS_EAGAIN;
}

/* One request of two parts of bytes; the reply's text goes to value[size] if there is one. */
static int xs_talk(u32 type, u32 tx, const char *a, u32 a_len, const char *b, u32 b_len,
		   char *value, u32 size)
{
	struct xsd_sockmsg msg = { .type = type, .tx_id = tx, .len = a_len + b_len };
	const struct xenbus_reply *reply;
	int rc = 0;

	mutex_lock(&xs_lock);
	xb_write(&msg, sizeof(msg));
	xb_write(a, a_len);
	xb_write(b, b_len);
	xb_send();
	reply = xb_wait_reply();
	if (reply->type != type)
		rc = xs_error(reply);
	else if (value)
		snprintf(value, size, "%s", reply->body);
	xb_reply_done();
	mutex_unlock(&xs_lock);
	return rc;
}

int xs_read(u32 tx, const char *path, char *value, u32 size)
{
	return xs_talk(XS_READ, tx, path, strlen(path) + 1, NULL, 0, value, size);
}

int xs_write(u32 tx, const char *path, const char *value)
{
	return xs_talk(XS_WRITE, tx, path, strlen(path) + 1, value, strlen(value), NULL, 0);
}

int xs_rm(u32 tx, const char *path)
{
	return xs_talk(XS_RM, tx, path, strlen(path) + 1, NULL, 0, NULL, 0);
}

int xs_transaction_start(u32 *tx)
{
	char id[16];
	int rc = xs_talk(XS_TRANSACTION_START, 0, "", 1, NULL, 0, id, sizeof(id));

	*tx = rc ? 0 : memparse(id, NULL);
	return rc;
}

int xs_transaction_end(u32 tx, int abort)
{
	return xs_talk(XS_TRANSACTION_END, tx, abort ? "F" : "T", 2, NULL, 0, NULL, 0);
}

static void xs_watch(const char *path)
{
	u32 len = strlen(path) + 1;

	xs_talk(XS_WATCH, 0, path, len, path, len, NULL, 0);
}

void register_xenbus_watch(struct xenbus_watch *watch)
{
	watch->next = watches;
	watches = watch;
	xs_watch(watch->path);
}

/* An event's body: the path that changed, NUL, the token of the watch, NUL. */
void xenwatch_event(const char *body, u32 len)
{
	u32 path_len = strlen(body) + 1;
	struct xenbus_watch *watch;

	if (path_len >= len)
		return;
	for (watch = watches; watch; watch = watch->next)
		if (!strcmp(watch->path, body + path_len))
			watch->fired = 1;
	wake_up_all(&watch_waitq);
}

static struct xenbus_watch *fired_watch(void)
{
	struct xenbus_watch *watch;

	for (watch = watches; watch && !watch->fired; watch = watch->next)
		;
	return watch;
}

/* Several events of one watch before its callback ran are one call. */
int xenwatch_thread(void *unused)
{
	struct xenbus_watch *watch;

	(void)unused;
	for (;;) {
		wait_event(&watch_waitq, fired_watch());
		watch = fired_watch();
		watch->fired = 0;
		watch->callback();
	}
	return 0;
}

/* Let the request that is out come back, and let no other one begin. */
int xs_suspend(void)
{
	mutex_lock(&xs_lock);
	xb_suspend();
	return 0;
}

void xs_suspend_cancel(void)
{
	mutex_unlock(&xs_lock);
}

/* Another xenstored. */
void xs_resume(void)
{
	xb_resume();
	mutex_unlock(&xs_lock);
}

/* It knows of no watch of ours. What changed before it does is not lost: the first event of a watch
 * comes with the watch. So nobody has to stand still meanwhile. */
static void xs_complete(void)
{
	struct xenbus_watch *watch;

	for (watch = watches; watch; watch = watch->next)
		xs_watch(watch->path);
}

struct device xenbus_device = {
	.name = "xenbus",
	.suspend = xs_suspend,
	.resume = xs_resume,
	.cancel = xs_suspend_cancel,
	.complete = xs_complete,
};
