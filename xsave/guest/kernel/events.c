/*
 * events.c - shared_info, its mapping, and the event channels in it (2-level ABI).
 *
 * A port pends in shared_info.evtchn_pending, its word in the vCPU's evtchn_pending_sel, the
 * vCPU in evtchn_upcall_pending; Xen then calls xen_event_callback unless upcalls are masked.
 * While suspended, HYPERVISOR_shared_info is a dummy and the page is not mapped. What a port is
 * for is irq.c's business.
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

/* Sets the bit; returns whether it was set. */
static int test_and_set_bit(u32 port, u64 *bits)
{
	u8 was;

	__asm__ volatile("lock; btsq %2, %0; setc %1"
			 : "+m"(bits[port / 64]), "=q"(was)
			 : "r"((u64)port % 64)
			 : "memory", "cc");
	return was;
}

int mask_evtchn(u32 port)
{
	return test_and_set_bit(port, HYPERVISOR_shared_info->evtchn_mask);
}

int set_evtchn(u32 port)
{
	return test_and_set_bit(port, HYPERVISOR_shared_info->evtchn_pending);
}

/* By Xen, which raises the event if it is pending: for whatever CPU the port is bound to. */
void unmask_evtchn(u32 port)
{
	HYPERVISOR_event_channel_op(EVTCHNOP_unmask, &port);
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
				handle_evtchn(word * 64 + __builtin_ctzl(bits));
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
