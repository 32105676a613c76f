/*
 * mm.h - frames, page tables and address spaces.
 *
 * Two kinds of frame number: a pfn is ours, dense from 0; an mfn is the machine's, and changes
 * when the domain moves. The law of this kernel: no mfn outlives the function that needed it,
 * except in page tables, the p2m list and the p2m's list tree. These are what a toolstack
 * rewrites on restore; an mfn anywhere else would be a wild pointer on the next host. Hence:
 *  - code that handles mfns or ptes is noinline and below the threads' outermost functions;
 *  - requests to Xen are built in static buffers and zeroed afterwards, with preemption off;
 *  - freed page tables are zeroed; dead stack is zeroed on every thread switch (entry.S);
 *  - nothing is decided, printed or ordered by an mfn;
 *  - no thread sleeps, and none meets cond_resched(), with an mfn or a pte in its hands.
 * But a pte under way is in registers, and with preempt=full any instruction can be the one at
 * which its thread loses the CPU for long: the law then holds again when the function is through.
 * That is what the freezer waits for.
 */
#ifndef XSAVE_GUEST_MM_H
#define XSAVE_GUEST_MM_H

#include "kernel.h"
#include "layout.h"
#include "xen.h"

/*
 * Functions on the way of an mfn or a pte into a page table or out of one. They have a section of
 * their own, [__pgtable_text_start, __pgtable_text_end), so that an observer of this kernel knows
 * where an interruption hurts: inside, a register may hold an mfn that nobody will translate.
 */
#define __pgtable noinline __attribute__((section(".pgtable.text")))

#define PAGE_SHIFT 12
#define PAGE_SIZE 4096UL
#define PTRS_PER_TABLE 512

#define _PAGE_PRESENT 0x001UL
#define _PAGE_RW 0x002UL
#define _PAGE_USER 0x004UL
#define _PAGE_ACCESSED 0x020UL
#define _PAGE_DIRTY 0x040UL
#define _PAGE_NX (1UL << 63)
#define PTE_PFN_MASK 0x000ffffffffff000UL

/* Ring 3 runs everything, so everything is a user page (Xen would add the bit itself). */
#define PAGE_KERNEL_RO (_PAGE_PRESENT | _PAGE_USER | _PAGE_ACCESSED)
#define PAGE_KERNEL (PAGE_KERNEL_RO | _PAGE_RW | _PAGE_DIRTY)
#define PAGE_TABLE PAGE_KERNEL
#define PAGE_USER_DATA (PAGE_KERNEL | _PAGE_NX)

/* Index into the table of `level` (1..4) on the way to `va`. */
static inline u32 table_index(u64 va, int level)
{
	return va >> (PAGE_SHIFT + 9 * (level - 1)) & 511;
}

#define P2M_PER_PAGE (PAGE_SIZE / sizeof(u64))
#define INVALID_P2M_ENTRY (~0UL)	/* a pfn without a frame */

extern u64 *p2m_top[];			/* leaves of the p2m, P2M_PER_PAGE mfns each */
extern u64 max_pfn;			/* number of pfns, holes included */
#define machine_to_phys_mapping ((const u64 *)MACH2PHYS_VIRT_START)

/* Where the mfn of `pfn` stands. */
static inline const u64 *p2m_entry(u64 pfn)
{
	return &p2m_top[pfn / P2M_PER_PAGE][pfn % P2M_PER_PAGE];
}

static inline u64 pfn_to_mfn(u64 pfn)
{
	return *p2m_entry(pfn);
}

static inline u64 mfn_to_pfn(u64 mfn)
{
	return machine_to_phys_mapping[mfn];
}

static inline void *pfn_to_virt(u64 pfn)
{
	return (void *)(PAGE_OFFSET + (pfn << PAGE_SHIFT));
}

/* For addresses of the direct map and of the kernel image. */
static inline u64 virt_to_pfn(const void *ptr)
{
	u64 va = (u64)ptr;

	return (va >= VIRT_BASE ? va - VIRT_BASE : va - PAGE_OFFSET) >> PAGE_SHIFT;
}

static inline u64 virt_to_machine(const void *ptr)
{
	return pfn_to_mfn(virt_to_pfn(ptr)) << PAGE_SHIFT | ((u64)ptr & (PAGE_SIZE - 1));
}

static inline u64 make_pte(u64 pfn, u64 flags)
{
	return pfn_to_mfn(pfn) << PAGE_SHIFT | flags;
}

/* The same frame, other flags. */
static inline u64 pte_modify(u64 pte, u64 flags)
{
	return (pte & PTE_PFN_MASK) | flags;
}

static inline u64 pte_pfn(u64 pte)
{
	return mfn_to_pfn((pte & PTE_PFN_MASK) >> PAGE_SHIFT);
}

/* page_alloc.c */
void page_alloc_init(u64 first_pfn, u64 end_pfn);
void *alloc_page(void);
void *alloc_pages_contiguous(u32 nr);
void free_page(void *page);
u64 nr_free_pages(void);

/* paging.c */
u64 paging_init(u64 first_free_pfn);
void paging_drop_boot_mapping(void);
u64 boot_structures_end(void);

/* p2m.c */
void p2m_use_boot_list(u64 *mfn_list);
void p2m_init(void);
u64 get_phys_to_machine(u64 pfn);
void set_phys_to_machine(u64 pfn, u64 mfn);
int p2m_grow(u64 pfn);
void build_mfn_list_list(void);
void publish_mfn_list_list(struct shared_info *shared);

/* An address space. The kernel's own is init_mm, whose upper half all others share. */
struct mm_struct {
	u64 *pgd;		/* L4, in the direct map */
	int pinned;		/* Xen has typed and pinned it: no direct stores any more */
	int pinning;		/* mm_pin() is under way: tables go read-only, one by one */
	int pinned_for_suspend;	/* by mm_pin_all(), to be undone */
	struct list_head mmlist;
};

extern struct mm_struct init_mm;

/* mmu.c */
void make_page_readonly(const void *page);
void make_page_readwrite(const void *page);
void queue_mmu_update(const u64 *entry, u64 pte);
void flush_mmu_updates(void);
void set_entry(struct mm_struct *mm, u64 *entry, u64 pte);
void change_protection(struct mm_struct *mm, u64 va, u64 flags);
u64 *pte_lookup(struct mm_struct *mm, u64 va);
u64 *pte_alloc(struct mm_struct *mm, u64 va);
void load_cr3(struct mm_struct *mm);
void switch_mm(struct mm_struct *next);

/* mm.c */
void mm_init(struct mm_struct *mm);
void mm_exit(struct mm_struct *mm);
void mm_pin(struct mm_struct *mm);
void mm_unpin(struct mm_struct *mm);
void mm_pin_all(void);
void mm_unpin_all(void);

#endif
