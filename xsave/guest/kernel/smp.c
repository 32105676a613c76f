/*
 * smp.c - the other vCPUs, and where each one's vcpu_info is.
 *
 * Xen gives a vCPU its first state as a whole (VCPUOP_initialise): page tables, descriptors,
 * traps, callbacks, the per-CPU area as GS base, and its idle thread's stack to start on.
 *
 * vcpu_info lives in a page of ours, so that a CPU masks its events at the same address for ever,
 * also while shared_info is away for a suspend. Xen knows of the page by VCPUOP_register_vcpu_info
 * and, in a new domain, knows nothing: xen_vcpu_restore() registers all of them again before any
 * other vCPU has run. For another vCPU that needs it down.
 */
#include "events.h"
#include "gdt.h"
#include "hypercall.h"
#include "mm.h"
#include "sched.h"
#include "smp.h"
#include "traps.h"
#include "vcpu.h"

#define IOPL1 0x1000		/* in rflags: what PV kernels ask for */

struct cpu cpu_data[NR_CPUS];
int nr_cpus = 1;

static struct vcpu_info vcpu_infos[NR_CPUS] __page_aligned;
_Static_assert(sizeof(vcpu_infos) <= PAGE_SIZE, "one frame is registered");

extern void xen_event_callback(void), xen_failsafe_callback(void), xen_syscall_target(void);
extern void cpu_bringup(void);

/* Before anything asks for this_cpu(): with events masked in the dummy shared_info. */
void cpu_init(void)
{
	cpu_data[0].self = &cpu_data[0];
	cpu_data[0].vcpu = &HYPERVISOR_shared_info->vcpu_info[0];
	cpu_data[0].online = 1;
	HYPERVISOR_set_segment_base(SEGBASE_GS_KERNEL, (u64)&cpu_data[0]);
}

/* Have this vCPU's info in our page. A failure is fatal: its events would be lost. */
noinline void xen_vcpu_setup(struct cpu *cpu)
{
	static struct vcpu_register_vcpu_info info;
	struct vcpu_info *mine = &vcpu_infos[cpu->id];
	u8 masked = cpu->vcpu ? READ_ONCE(cpu->vcpu->evtchn_upcall_mask) : 1;

	info.mfn = pfn_to_mfn(virt_to_pfn(mine));
	info.offset = (u64)mine & (PAGE_SIZE - 1);
	if (HYPERVISOR_vcpu_op(VCPUOP_register_vcpu_info, cpu->id, &info))
		panic("vcpu_info of CPU %d not registered", cpu->id);
	info.mfn = 0;
	/* Xen has copied its own one over it, where the mask is off if the CPU blocks there. */
	WRITE_ONCE(mine->evtchn_upcall_mask, mine->evtchn_upcall_mask & masked);
	cpu->vcpu = mine;
}

/* In a new domain. Whoever is not this CPU is taken down for it. */
noinline void xen_vcpu_restore(void)
{
	struct cpu *cpu;

	for_each_online_cpu(cpu) {
		int other = cpu != this_cpu();

		if (other && HYPERVISOR_vcpu_op(VCPUOP_down, cpu->id, NULL))
			panic("CPU %d does not go down", cpu->id);
		xen_vcpu_setup(cpu);
		if (other && HYPERVISOR_vcpu_op(VCPUOP_up, cpu->id, NULL))
			panic("CPU %d does not come up again", cpu->id);
	}
}

/* entry.S, on the idle thread's stack of a fresh vCPU; events are masked. */
noreturn void start_secondary(void)
{
	struct cpu *cpu = this_cpu();

	HYPERVISOR_stack_switch(FLAT_RING3_SS64, (u64)cpu->idle + THREAD_SIZE);
	gdt_check();
	WRITE_ONCE(cpu->online, 1);
	local_irq_enable();
	cpu_idle();
}

static noinline void fill_context(struct vcpu_guest_context *ctxt, struct cpu *cpu)
{
	ctxt->flags = VGCF_in_kernel | VGCF_failsafe_disables_events | VGCF_syscall_disables_events;
	ctxt->user_regs.rip = (u64)cpu_bringup;
	ctxt->user_regs.rsp = (u64)cpu->idle + THREAD_SIZE;
	ctxt->user_regs.cs = FLAT_RING3_CS64;
	ctxt->user_regs.ss = FLAT_RING3_SS64;
	ctxt->user_regs.rflags = IOPL1;
	ctxt->kernel_ss = FLAT_RING3_SS64;
	ctxt->kernel_sp = ctxt->user_regs.rsp;
	ctxt->gs_base_kernel = (u64)cpu;
	trap_copy_table(ctxt->trap_ctxt);
	ctxt->gdt_frames[0] = gdt_alloc();
	ctxt->gdt_ents = GDT_ENTRIES;
	ctxt->ctrlreg[3] = pfn_to_mfn(virt_to_pfn(init_mm.pgd)) << PAGE_SHIFT;
	ctxt->event_callback_eip = (u64)xen_event_callback;
	ctxt->failsafe_callback_eip = (u64)xen_failsafe_callback;
	ctxt->syscall_callback_eip = (u64)xen_syscall_target;
}

/* The context names frames: it is zeroed before it is given back. */
static noinline long initialise_vcpu(struct cpu *cpu)
{
	struct vcpu_guest_context *ctxt = alloc_pages_contiguous(2);
	long rc;

	BUG_ON(!ctxt);
	fill_context(ctxt, cpu);
	rc = HYPERVISOR_vcpu_op(VCPUOP_initialise, cpu->id, ctxt);
	free_page(ctxt);
	free_page((char *)ctxt + PAGE_SIZE);
	return rc;
}

static noinline void cpu_up(struct cpu *cpu)
{
	void *stack = alloc_pages_contiguous(THREAD_PAGES);

	BUG_ON(!stack);
	cpu->self = cpu;
	sched_init_cpu(cpu);
	cpu->curr = idle_init(cpu, stack);
	xen_vcpu_setup(cpu);
	if (initialise_vcpu(cpu) || HYPERVISOR_vcpu_op(VCPUOP_up, cpu->id, NULL))
		panic("CPU %d does not come up", cpu->id);
	while (!READ_ONCE(cpu->online))
		HYPERVISOR_sched_op(SCHEDOP_yield, NULL);
}

/* All vCPUs there are; their events are bound by whoever binds CPU 0's, later. */
void smp_init(void)
{
	int id;

	xen_vcpu_setup(&cpu_data[0]);
	for (id = 1; id < NR_CPUS; id++) {
		if (HYPERVISOR_vcpu_op(VCPUOP_is_up, id, NULL) < 0)
			break;
		cpu_data[id].id = id;
		cpu_up(&cpu_data[id]);
	}
	nr_cpus = id;
	if (nr_cpus > 1)
		printk("%d CPUs\n", nr_cpus);
}
