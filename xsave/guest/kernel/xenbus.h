/* xenbus.h - the xenstore client. */
#ifndef XSAVE_GUEST_XENBUS_H
#define XSAVE_GUEST_XENBUS_H

#include "types.h"

#define XS_EAGAIN 11	/* a transaction met somebody else's change: do it again */
#define XS_EINVAL 22	/* any other error xenstored names */

/* xenbus.c: the ring, and the thread that reads it */
struct xenbus_reply {
	u32 type;
	u32 len;
	const char *body;	/* with a NUL behind it */
};
int xenbus_init(void);
void xb_write(const void *data, u32 len);
void xb_send(void);
const struct xenbus_reply *xb_wait_reply(void);
void xb_reply_done(void);
void xb_suspend(void);
void xb_resume(void);
u64 store_pfn(void);

/* xs.c: requests; 0, -XS_EAGAIN or -XS_EINVAL. Not for freezable threads. */
int xs_read(u32 tx, const char *path, char *value, u32 size);
int xs_write(u32 tx, const char *path, const char *value);
int xs_rm(u32 tx, const char *path);
int xs_transaction_start(u32 *tx);
int xs_transaction_end(u32 tx, int abort);
int xs_suspend(void);
void xs_resume(void);
void xs_suspend_cancel(void);

extern struct device xenbus_device;	/* these, and the watches anew */

struct xenbus_watch {
	const char *path;		/* also the token */
	void (*callback)(void);		/* runs in the xenwatch thread */
	int fired;
	struct xenbus_watch *next;
};
void register_xenbus_watch(struct xenbus_watch *watch);
void xenwatch_event(const char *body, u32 len);
int xenwatch_thread(void *unused);

#endif
