/*
 * events.c - shared_info, its mapping, and the event channels in it (2-level ABI).
 *
 * A port pends in shared_info.evtchn_pending, its word in the vCPU's evtchn_pending_sel, the
 * vCPU in evtchn_upcall_pending; Xen then calls xen_event_callback unless upcalls are masked.
 * While suspended, HYPERVISOR_shared_info is a dummy and the page is not mapped.
 */
#include "events.h"
#include "hypercall.h"
#include "mm.h"
#include "sched.h"

extern struct shared_info fix_shared_info;	/* link.ld: a page of address space */
extern void xen_event_callback(void), xen_failsafe_callback(void), xen_syscall_target(void);

static struct shared_info dummy_shared_info = {
	.vcpu_info[0].evtchn_upcall_mask = 1,
};
struct shared_info *HYPERVISOR_shared_info = &dummy_shared_info;

/* Four ports for each CPU at most, and the two rings'. */
static struct {
	u32 port;
	int cpu;			/* whose event it is: the words of pending bits are shared */
	void (*handler)(void);
} actions[40];

static void set_shared_info(struct shared_info *shared)
{
	struct cpu *cpu = this_cpu();

	/* Until smp.c has a place of its own for it. */
	if (cpu->vcpu == &HYPERVISOR_shared_info->vcpu_info[0])
		cpu->vcpu = &shared->vcpu_info[0];
	HYPERVISOR_shared_info = shared;
}

/* Map the page whose machine address start_info gives; the dummy has the mask until then. */
noinline void map_shared_info(void)
{
	u64 pte = (xen_start_info->shared_info & PTE_PFN_MASK) | PAGE_KERNEL;

	BUG_ON(HYPERVISOR_update_va_mapping((u64)&fix_shared_info, pte, UVMF_INVLPG));
	set_shared_info(&fix_shared_info);
}

noinline void unmap_shared_info(void)
{
	set_shared_info(&dummy_shared_info);
	BUG_ON(HYPERVISOR_update_va_mapping((u64)&fix_shared_info, 0, UVMF_INVLPG));
}

/* Events that came while masked are delivered in any hypercall: make an empty one. */
void local_irq_enable(void)
{
	struct vcpu_info *vcpu = this_cpu()->vcpu;

	barrier();
	WRITE_ONCE(vcpu->evtchn_upcall_mask, 0);
	barrier();
	if (unlikely(READ_ONCE(vcpu->evtchn_upcall_pending)))
		HYPERVISOR_xen_version(0, NULL);
}

void notify_remote_via_evtchn(u32 port)
{
	HYPERVISOR_event_channel_op(EVTCHNOP_send, &port);
}

void clear_evtchn(u32 port)
{
	__asm__ volatile("lock; btrq %1, %0"
			 : "+m"(HYPERVISOR_shared_info->evtchn_pending[port / 64])
			 : "r"((u64)port % 64)
			 : "memory", "cc");
}

static void unmask_evtchn(u32 port)
{
	HYPERVISOR_event_channel_op(EVTCHNOP_unmask, &port);
}

static void bind_port(u32 port, int cpu, void (*handler)(void))
{
	u32 i;

	for (i = 0; i < ARRAY_SIZE(actions); i++) {
		if (actions[i].handler)
			continue;
		actions[i].port = port;
		actions[i].cpu = cpu;
		actions[i].handler = handler;
		unmask_evtchn(port);
		return;
	}
	panic("no room for another event handler");
}

/* The rings' ports are CPU 0's, as Xen made them. */
void bind_evtchn_to_handler(u32 port, void (*handler)(void))
{
	bind_port(port, 0, handler);
}

/* A new port by which any CPU can interrupt `cpu`. */
u32 bind_ipi_to_handler(int cpu, void (*handler)(void))
{
	struct evtchn_bind_ipi bind = { .vcpu = cpu };

	if (HYPERVISOR_event_channel_op(EVTCHNOP_bind_ipi, &bind))
		panic("no IPI to CPU %d", cpu);
	bind_port(bind.port, cpu, handler);
	return bind.port;
}

/* The port `virq` is bound to already: after a resume into the same domain, nothing was lost. */
static u32 find_virq(u32 virq, int cpu)
{
	struct evtchn_status status;
	u32 port;

	for (port = 1; port < NR_EVENT_CHANNELS; port++) {
		memset(&status, 0, sizeof(status));
		status.dom = DOMID_SELF;
		status.port = port;
		if (HYPERVISOR_event_channel_op(EVTCHNOP_status, &status))
			break;
		if (status.status == EVTCHNSTAT_virq && status.virq == virq &&
		    status.vcpu == (u32)cpu)
			return port;
	}
	panic("virq %u is bound nowhere", virq);
}

void bind_virq_to_handler(u32 virq, int cpu, void (*handler)(void))
{
	struct evtchn_bind_virq bind = { .virq = virq, .vcpu = cpu };
	long rc = HYPERVISOR_event_channel_op(EVTCHNOP_bind_virq, &bind);

	if (rc == -XEN_EEXIST)
		bind.port = find_virq(virq, cpu);
	else if (rc)
		panic("bind_virq %u refused: %ld", virq, rc);
	bind_port(bind.port, cpu, handler);
}

/* In a new domain no port of the old one means anything. */
void unbind_all_handlers(void)
{
	memset(actions, 0, sizeof(actions));
}

/* After a cancelled suspend the ports are as they were; only their masks are not trusted. */
void unmask_all_handlers(void)
{
	u32 i;

	for (i = 0; i < ARRAY_SIZE(actions); i++)
		if (actions[i].handler)
			unmask_evtchn(actions[i].port);
}

static void handle_port(u32 port)
{
	u32 i;

	for (i = 0; i < ARRAY_SIZE(actions); i++)
		if (actions[i].handler && actions[i].port == port)
			break;
	if (i < ARRAY_SIZE(actions) && actions[i].cpu != this_cpu()->id)
		return;		/* pending for another CPU, in the same word */
	clear_evtchn(port);
	if (i < ARRAY_SIZE(actions))
		actions[i].handler();
}

static u64 take(u64 *word)
{
	u64 value = 0;

	__asm__ volatile("xchgq %0, %1" : "+r"(value), "+m"(*word) : : "memory");
	return value;
}

/* entry.S, on the stack of whatever was interrupted; events are masked. */
void xen_evtchn_do_upcall(struct pt_regs *regs)
{
	struct shared_info *shared = HYPERVISOR_shared_info;
	struct vcpu_info *vcpu = this_cpu()->vcpu;
	u64 words, bits;
	u32 word;

	(void)regs;
	do {
		WRITE_ONCE(vcpu->evtchn_upcall_pending, 0);
		for (words = take(&vcpu->evtchn_pending_sel); words; words &= words - 1) {
			word = __builtin_ctzl(words);
			bits = READ_ONCE(shared->evtchn_pending[word]) &
			       ~READ_ONCE(shared->evtchn_mask[word]);
			for (; bits; bits &= bits - 1)
				handle_port(word * 64 + __builtin_ctzl(bits));
		}
	} while (READ_ONCE(vcpu->evtchn_upcall_pending));
}

static void register_callback(u16 type, u16 flags, void (*entry)(void))
{
	struct callback_register cb = { .type = type, .flags = flags, .address = (u64)entry };

	if (HYPERVISOR_callback_op(CALLBACKOP_register, &cb))
		panic("callback %u refused", type);
}

void events_init(void)
{
	register_callback(CALLBACKTYPE_event, 0, xen_event_callback);
	register_callback(CALLBACKTYPE_failsafe, CALLBACKF_mask_events, xen_failsafe_callback);
	register_callback(CALLBACKTYPE_syscall, CALLBACKF_mask_events, xen_syscall_target);
}
