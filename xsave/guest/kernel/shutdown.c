/*
 * shutdown.c - what the toolstack asks for in control/shutdown, and the acknowledgement.
 */
#include "balloon.h"
#include "console.h"
#include "evtest.h"
#include "hypercall.h"
#include "sched.h"
#include "suspend.h"
#include "xenbus.h"

static void leave(const char *line, u32 reason)
{
	struct sched_shutdown arg = { reason };

	printk("%s\n", line);
	console_suspend();
	HYPERVISOR_sched_op(SCHEDOP_shutdown, &arg);
	panic("shutdown %u did not happen", reason);
}

static void do_poweroff(void)
{
	leave("POWEROFF", SHUTDOWN_poweroff);
}

static void do_reboot(void)
{
	leave("REBOOT", SHUTDOWN_reboot);
}

static const struct shutdown_handler {
	const char *command;
	const char *feature;	/* advertised so that the toolstack need not guess */
	void (*act)(void);
} handlers[] = {
	{ "suspend", "control/feature-suspend", do_suspend },
	{ "poweroff", "control/feature-poweroff", do_poweroff },
	{ "reboot", "control/feature-reboot", do_reboot },
	{ "halt", NULL, do_poweroff },
};

static const struct shutdown_handler *find_handler(const char *command)
{
	u32 i;

	for (i = 0; i < ARRAY_SIZE(handlers); i++)
		if (!strcmp(handlers[i].command, command))
			return &handlers[i];
	return NULL;
}

/*
 * Read the node and clear it in one transaction: clearing is the acknowledgement, and it may
 * only acknowledge what was read. Only a command that will be acted on is cleared. -XS_EAGAIN:
 * the node changed meanwhile.
 */
static int take_command(const struct shutdown_handler **handler)
{
	char command[16] = "";
	u32 tx;
	int rc;

	*handler = NULL;
	rc = xs_transaction_start(&tx);
	if (rc)
		return rc;
	rc = xs_read(tx, "control/shutdown", command, sizeof(command));
	if (!rc)
		*handler = find_handler(command);
	if (!*handler) {
		xs_transaction_end(tx, 1);
		return 0;
	}
	rc = xs_write(tx, "control/shutdown", "");
	if (rc)
		xs_transaction_end(tx, 1);
	return rc ? rc : xs_transaction_end(tx, 0);
}

static void shutdown_handler(void)
{
	const struct shutdown_handler *handler;
	int rc;

	do
		rc = take_command(&handler);
	while (rc == -XS_EAGAIN);
	if (!rc && handler)
		handler->act();
}

static struct xenbus_watch shutdown_watch = {
	.path = "control/shutdown",
	.callback = shutdown_handler,
};

void advertise_shutdown_features(void)
{
	u32 i;

	for (i = 0; i < ARRAY_SIZE(handlers); i++)
		if (handlers[i].feature)
			xs_write(0, handlers[i].feature, "1");
}

/* The init thread: what needs a scheduler and xenstore, then gone. */
int setup_shutdown_watcher(void *unused)
{
	(void)unused;
	BUG_ON(!kthread_run(xenwatch_thread, NULL, PF_NOFREEZE, "xenwatch"));
	register_xenbus_watch(&shutdown_watch);
	balloon_init();
	evtest_init();
	advertise_shutdown_features();
	return 0;
}
