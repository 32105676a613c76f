/*
 * main.c - start of day.
 *
 * start_kernel() runs on the boot stack, which becomes the idle thread's. Until the direct map
 * is there, what the builder made is reached at VIRT_BASE + pfn * 4096.
 */
#include "console.h"
#include "device.h"
#include "events.h"
#include "gdt.h"
#include "heartbeat.h"
#include "hypercall.h"
#include "mm.h"
#include "misbehave.h"
#include "mmtest.h"
#include "pattern.h"
#include "sched.h"
#include "smp.h"
#include "suspend.h"
#include "time.h"
#include "writer.h"
#include "xenbus.h"

#define RESERVED_PAGES 256	/* stacks, the p2m tree, and air */

struct start_info *xen_start_info;

/* The text behind "key=" on the command line, or NULL. */
const char *cmdline_find(const char *key)
{
	const char *at = xen_start_info->cmd_line;
	u64 len = strlen(key);

	while (*at) {
		if (!strncmp(at, key, len) && at[len] == '=')
			return at + len + 1;
		while (*at && *at != ' ')
			at++;
		while (*at == ' ')
			at++;
	}
	return NULL;
}

u64 cmdline_number(const char *key, u64 otherwise)
{
	const char *text = cmdline_find(key);

	return text ? memparse(text, NULL) : otherwise;
}

/* Whether the command line has key=value, as a word. */
int cmdline_is(const char *key, const char *value)
{
	const char *text = cmdline_find(key);
	u64 len = strlen(value);

	return text && !strncmp(text, value, len) && (!text[len] || text[len] == ' ');
}

static noinline void iopl_init(void)
{
	u32 iopl = 1;	/* what PV kernels ask for; kept in the vCPU's saved rflags */

	HYPERVISOR_physdev_op(PHYSDEVOP_set_iopl, &iopl);
}

/*
 * Memory: builder's things | tables of the direct map | the page allocator's | what the writer
 * writes | the pattern.
 */
static noinline void mem_init(u64 *pattern_pages)
{
	u64 first, wanted = pattern_size(), written = writer_size(), reserve;

	first = paging_init(boot_structures_end());
	console_remap();
	paging_drop_boot_mapping();
	reserve = RESERVED_PAGES + cmdline_number("threads", 4) * MMTEST_PAGES;
	if (first + reserve + wanted + written > max_pfn && written) {
		printk("write: %lu pages do not fit\n", written);
		written = 0;
	}
	if (first + reserve + wanted > max_pfn) {
		printk("touch: %lu pages do not fit\n", wanted);
		wanted = max_pfn > first + reserve ? max_pfn - first - reserve : 1;
	}
	page_alloc_init(first, max_pfn - wanted - written);
	writer_init(max_pfn - wanted - written, written);
	*pattern_pages = wanted;
}

static void start_threads(void)
{
	u32 wanted = cmdline_number("threads", 4);
	int started;

	if (xenbus_init() == 0)
		BUG_ON(!kthread_run(setup_shutdown_watcher, NULL, PF_NOFREEZE, "init"));
	stop_machine_init();
	BUG_ON(!kthread_run(ticker_thread, NULL, 0, "ticker"));
	BUG_ON(!kthread_run_on(&cpu_data[nr_cpus - 1], PRIO_NORMAL, checker_thread, NULL, 0,
			       "checker"));
	misbehave_start();
	writer_start();
	heartbeat_start();
	started = mmtest_start(wanted);
	printk("%d threads make and destroy address spaces\n", started);
}

noreturn void start_kernel(struct start_info *si)
{
	u64 pattern_pages;
	struct cpu *cpu;

	xen_start_info = si;
	p2m_use_boot_list((u64 *)si->mfn_list);
	cpu_init();
	console_early_init();
	printk("xsave guest kernel, %lu pages\n", max_pfn);
	printk("command line: %s\n", si->cmd_line);
	sched_init();
	trap_init();
	iopl_init();
	map_shared_info();
	events_init();
	mem_init(&pattern_pages);
	gdt_init();
	p2m_init();
	publish_mfn_list_list(HYPERVISOR_shared_info);
	HYPERVISOR_stack_switch(FLAT_RING3_SS64, (u64)current + THREAD_SIZE);
	smp_init();
	time_init();
	for_each_online_cpu(cpu)
		bind_ipis(cpu);
	console_resume();
	device_register(&xenbus_device);
	device_register(&console_device);
	pattern_init(max_pfn - pattern_pages, pattern_pages);
	start_threads();
	printk("%lu pages free\n", nr_free_pages());
	local_irq_enable();
	cpu_idle();
}
