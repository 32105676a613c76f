/* user_space.h - what one mmtest thread has in its address space, and how it changes that. */
#ifndef XSAVE_GUEST_USER_SPACE_H
#define XSAVE_GUEST_USER_SPACE_H

#include "mm.h"

#define SLOTS 24		/* pages mapped, at a third each of three places */
#define EXTRA_VA 0x0000123456789000UL
#define WORDS (PAGE_SIZE / sizeof(u64))

struct user_space {
	struct mm_struct mm;
	u64 random;
	u64 life;		/* counts address spaces: part of every page's content */
	u32 nr;			/* slots in use */
	u64 pfn[SLOTS];		/* frame in each slot */
	u64 content[SLOTS];	/* and which content it has */
	u64 extra_pfn;
};
_Static_assert(sizeof(struct user_space) <= PAGE_SIZE, "one page each");

u64 slot_va(u32 slot);
void fill_page(struct user_space *us, u64 *page, u64 content);
void check_page(struct user_space *us, const u64 *page, u64 content);

/* Page tables: in the section of those who hold ptes. */
int map_page(struct mm_struct *mm, u64 va, u64 pfn, u64 flags);
int maps_pfn(struct mm_struct *mm, u64 va, u64 pfn);
void unmap_page(struct mm_struct *mm, u64 va);
void remap_slots(struct user_space *us);
void update_slot(struct user_space *us, u32 slot, u64 flags);
void update_slot_away(u32 slot);
void flush_tlb(void);

#endif
