/*
 * What the files of this library share: numbers, structures, and who does what.
 */
#ifndef FASTPATH_H
#define FASTPATH_H

#include <stdint.h>

#define DOMID_SELF 0x7ff0
#define PAGE_SHIFT 12
#define FRAME_MASK 0x000ffffffffff000ULL
#define PRESENT 0x001ULL
#define RW 0x002ULL
#define USER 0x004ULL
#define ACCESSED_DIRTY 0x060ULL
#define PSE 0x080ULL
#define L1_DISALLOWED (0x008ULL | 0x010ULL | PSE) /* PWT, PCD */
#define UPPER_DISALLOWED (L1_DISALLOWED | 0x100ULL) /* GLOBAL */

enum page_type { PGT_NONE, PGT_L1, PGT_L2, PGT_L3, PGT_L4, PGT_WRITABLE, PGT_SEG_DESC, PGT_XEN };
enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, RIP = 16, HFLAGS = 44, CR3 = 56 };
enum { CS_SEL = 26, CS_BASE, SS_SEL = 29, FS_BASE = 36, GS_SEL = 38, GS_BASE };
/* Of a segment, in words behind its selector (cpuregs.py). */
#define LIMIT_AND_FLAGS 2
#define FLAT_RING3_DATA 0x00cff300ffffffffULL
#define CODE64 (1U << 15)
#define LONG_MODE (CODE64 | 1U << 4 | 1U << 5)

enum { MMU_UPDATE = 1, STACK_SWITCH = 3, XEN_VERSION = 17, IRET = 23, VCPU_OP, SET_SEGMENT_BASE };
enum { MMUEXT_OP = 26, MMUEXT_NEW_BASEPTR = 5, MMUEXT_NEW_USER_BASEPTR = 15 };
enum { VCPUOP_IS_UP = 3, VCPUOP_SET_SINGLESHOT = 8, SINGLESHOT_FUTURE = 1 };
enum { SEGBASE_FS, SEGBASE_GS_USER, SEGBASE_GS_KERNEL, SEGBASE_GS_USER_SEL };
/* Words of struct vcpu_guest_context, from its control registers on. */
enum { GDT_FRAMES = -19, GDT_ENTRIES = -3, KERNEL_SS, KERNEL_SP };
enum { USER_CR3 = 1, KERNEL_CR3 = 3, EVENT_CALLBACK = 16, GS_BASE_USER = 22 };
#define MOST_UPDATES 32
#define ENOENT 2
#define SINGLESHOT_BYTES 12
#define NEVER UINT64_MAX

#define TABLE_INDICATOR 4
#define RESERVED_GDT_ENTRIES (14 * 512) /* the first that is Xen's */
#define DESCRIPTOR_PRESENT (1ULL << 47)
#define FLAT_RING3_CS64 0xe033
#define FLAT_RING3_SS64 0xe02b
#define RFLAGS_TF 0x100ULL
#define RFLAGS_IF 0x200ULL
#define RFLAGS_LIVE 0x240dd5ULL	   /* what is the guest's */
#define RFLAGS_HIDDEN 0x3200ULL	   /* IOPL, IF: in no frame */
#define RFLAGS_CLEARED 0x54100ULL  /* AC, RF, NT, TF: on the way into the kernel */
#define VGCF_IN_SYSCALL 0x100
#define UC_RFLAGS 253 /* UC_X86_REG_RFLAGS */

#define GP_FAULT 13
#define SYSCALL_BYTES 2
#define CLOCK_MONOTONIC 1
#define NS_PER_S 1000000000ULL
#define KHZ_TO_NS 1000000ULL

struct timespec64 {
	int64_t s, ns;
};

struct mmu_request {
	uint64_t pointer, value;
};

struct mmuext_request {
	uint32_t command, padding;
	uint64_t arg1, arg2;
};

struct singleshot {
	uint64_t timeout;
	uint32_t flags;
};

struct iret_frame {
	uint64_t rax, r11, rcx, flags, rip, cs, rflags, rsp, ss;
};

struct bounce_frame {
	uint64_t rcx, r11, rip, cs, rflags, rsp, ss;
};

/* The emulator's TLB, CPUTLB: an entry is all ones where there is none. */
struct tlb_entry {
	uint64_t read, write, code, physical, addend, unused[3];
};

#define TLB_VICTIMS 8

struct tlb_mode {
	uint64_t large_address, large_mask, window_begin, window_max, used, next_victim;
	struct tlb_entry victims[TLB_VICTIMS];
	uint64_t victims_iotlb[TLB_VICTIMS][2], iotlb;
};

struct tlb {
	uint64_t counters[4]; /* the first: a bit for each mode that has entries */
	struct tlb_mode modes[3];
	uint64_t padding;
	struct {
		uint64_t mask; /* (entries - 1) * 64 */
		struct tlb_entry *entries;
	} tables[3];
};

#define LARGE_TLB 1024
#define MODE_USER 1 /* a PV guest's kernel is there too */
#define NR_BLOCK_CACHE 4096
#define MOST_STALE 16

/* *unflushed: what has changed is Python's, or in `stale` */
enum { ALL_FLUSHED, UNFLUSHED, UNFLUSHED_STALE };

struct fastpath {
	/* the emulator */
	uint64_t *registers;
	uint32_t *exception; /* error code; behind it, whether an `int` raised it */
	uint32_t *old_exception;
	void *cpu;
	void (*tlb_flush)(void *cpu);
	struct tlb *tlb;
	uint64_t *block_cache; /* of virtual addresses: tb_jmp_cache */
	int (*read_register)(void *engine, int which, void *value);
	int (*write_register)(void *engine, int which, const void *value);
	int (*clock_gettime)(int clock, struct timespec64 *now);
	/* Python's way, and the end of a crossing in which there is something to do */
	void (*slow_syscall)(void *engine, void *data);
	void (*slow_exception)(void *engine, uint32_t vector, void *data);
	void (*leave)(uint64_t skip);
	/* the machine */
	uint64_t *memory;
	uint16_t *owner;
	uint8_t *page_type;
	uint32_t *type_count;
	uint32_t *references;
	uint64_t nr_frames;
	uint64_t domid;
	/* pagetable.py: a present entry has changed since the last flush */
	uint8_t *unflushed;
	/* the domain, as of the last crossing that Python saw */
	uint64_t open; /* 0: everything is Python's */
	uint64_t in_kernel;
	uint64_t *control_registers; /* in its struct vcpu_guest_context */
	volatile uint8_t *events; /* of struct vcpu_info: pending, mask */
	uint64_t nr_vcpus;
	uint64_t version; /* what XENVER_version says */
	uint64_t clock_offset; /* the domain's time is the monotonic clock's and this */
	uint64_t khz;
	uint64_t *timer; /* of the vCPU that runs, by the domain's time */
	uint64_t deadline; /* by the monotonic clock: a timer is due */
	/* both sides */
	volatile uint64_t kicked;
	uint64_t nr_crossings;
	/* this side's: physical pages that an entry showed which has changed since the last flush */
	uint64_t nr_stale;
	uint64_t stale[MOST_STALE];
};

static inline int owned(struct fastpath *f, uint64_t mfn)
{
	return mfn < f->nr_frames && f->owner[mfn] == f->domid && f->page_type[mfn] != PGT_XEN;
}

static inline int canonical(uint64_t address)
{
	uint64_t top = address >> 47;

	return top == 0 || top == 0x1ffff;
}

/* memory.c */
void *guest_page(struct fastpath *f, uint64_t address, uint64_t nr, uint64_t need);
void *guest_bytes(struct fastpath *f, uint64_t address, uint64_t nr);

/* Of these, 0: it is not that simple, and is Python's. */
/* tables.c */
int mmu_update(struct fastpath *f);
/* spaces.c */
int mmuext_op(struct fastpath *f);
/* calls.c */
int vcpu_op(struct fastpath *f);
int stack_switch(struct fastpath *f);
int set_segment_base(struct fastpath *f);
int xen_version(struct fastpath *f);

#endif
