/*
 * xenbus.c - the xenstore ring: requests out, replies and watch events in.
 *
 * The xenbus thread alone reads; it hands a reply to the one request that is out (xs.c holds a
 * lock around it) and a watch event to xenwatch. Before a suspend no request is out and no
 * message is half read, so a new domain may start with an empty ring.
 */
#include "events.h"
#include "mm.h"
#include "sched.h"
#include "xenbus.h"

static volatile struct xenstore_domain_interface *intf;
static u64 intf_pfn;
static u32 port;
static int irq;

static WAIT_QUEUE(xb_waitq);	/* the ring moved */
static WAIT_QUEUE(reply_waitq);
static WAIT_QUEUE(quiet_waitq);
static int in_message, reply_ready;
static char body[XENSTORE_PAYLOAD_MAX + 1];
static struct xenbus_reply reply = { .body = body };

static u32 req_room(void)
{
	return XENSTORE_RING_SIZE - (intf->req_prod - intf->req_cons);
}

static u32 rsp_used(void)
{
	return intf->rsp_prod - intf->rsp_cons;
}

static int room_for_more(void)
{
	if (!req_room())
		notify_remote_via_evtchn(port);
	return req_room();
}

/* A part of a request; xb_send() says that it is whole. */
void xb_write(const void *data, u32 len)
{
	const char *src = data;
	u32 prod, room;

	while (len) {
		wait_event(&xb_waitq, room_for_more());
		prod = intf->req_prod;
		room = min(req_room(), len);
		for (len -= room; room; room--)
			intf->req[prod++ % XENSTORE_RING_SIZE] = *src++;
		wmb();
		intf->req_prod = prod;
	}
}

void xb_send(void)
{
	notify_remote_via_evtchn(port);
}

static void xb_read(void *data, u32 len)
{
	char *dst = data;
	u32 cons, used;

	while (len) {
		wait_event(&xb_waitq, rsp_used());
		rmb();
		cons = intf->rsp_cons;
		used = min(rsp_used(), len);
		for (len -= used; used; used--)
			*dst++ = intf->rsp[cons++ % XENSTORE_RING_SIZE];
		mb();
		intf->rsp_cons = cons;
		in_message = 1;
		notify_remote_via_evtchn(port);
	}
}

static void process_msg(void)
{
	struct xsd_sockmsg msg;

	xb_read(&msg, sizeof(msg));
	if (msg.len > XENSTORE_PAYLOAD_MAX)
		panic("xenstore message of %u bytes", msg.len);
	xb_read(body, msg.len);
	body[msg.len] = 0;
	if (msg.type == XS_WATCH_EVENT) {
		xenwatch_event(body, msg.len);
		return;
	}
	reply.type = msg.type;
	reply.len = msg.len;
	reply_ready = 1;
	wake_up_all(&reply_waitq);
	/* The reply lies in the one body buffer: read no further until it was taken. */
	wait_event(&reply_waitq, !reply_ready);
}

static int xenbus_thread(void *unused)
{
	(void)unused;
	for (;;) {
		process_msg();
		in_message = 0;
		wake_up_all(&quiet_waitq);
	}
	return 0;
}

/* The reply to the request just written; valid until the caller's xb_reply_done(). */
const struct xenbus_reply *xb_wait_reply(void)
{
	wait_event(&reply_waitq, reply_ready);
	return &reply;
}

void xb_reply_done(void)
{
	reply_ready = 0;
	wake_up_all(&reply_waitq);
}

static void xenbus_interrupt(void)
{
	wake_up_all(&xb_waitq);
}

static void xb_connect(void)
{
	port = xen_start_info->store_evtchn;
	if (irq)
		rebind_evtchn_irq(port, irq);
	else
		irq = bind_evtchn_to_irqhandler(port, xenbus_interrupt);
}

/* 0; -1 where the domain has no xenstore. */
noinline int xenbus_init(void)
{
	if (!xen_start_info->store_mfn)
		return -1;
	intf_pfn = mfn_to_pfn(xen_start_info->store_mfn);
	intf = pfn_to_virt(intf_pfn);
	xb_connect();
	BUG_ON(!kthread_run(xenbus_thread, NULL, PF_NOFREEZE, "xenbus"));
	return 0;
}

/* The caller made sure that no request is out; wait until the reader is between messages. */
void xb_suspend(void)
{
	wait_event(&quiet_waitq, !in_message);
}

/* A new domain: another port, and nothing of what xenstored may have sent counts any more. */
void xb_resume(void)
{
	intf->rsp_cons = intf->rsp_prod;
	xb_connect();
}

u64 store_pfn(void)
{
	return intf_pfn;
}
