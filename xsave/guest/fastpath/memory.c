/*
 * memory.c - where a guest address lies, by its own page tables.
 */
#include "fastpath.h"

/*
 * Return where nr bytes at a guest address are, if they are in one page, whose entries all have
 * what is needed; 0 else.
 */
void *guest_page(struct fastpath *f, uint64_t address, uint64_t nr, uint64_t need)
{
	uint64_t frame = f->registers[CR3] >> PAGE_SHIFT, entry;

	if (!canonical(address) || (address & 0xfff) + nr > 0x1000)
		return 0;
	for (int shift = 39; shift >= 12; shift -= 9) {
		if (frame >= f->nr_frames)
			return 0;
		entry = f->memory[frame << 9 | (address >> shift & 511)];
		if ((entry & need) != need || (shift > 12 && entry & PSE))
			return 0;
		frame = (entry & FRAME_MASK) >> PAGE_SHIFT;
	}
	if (frame >= f->nr_frames)
		return 0;
	return (char *)f->memory + (frame << PAGE_SHIFT | (address & 0xfff));
}

void *guest_bytes(struct fastpath *f, uint64_t address, uint64_t nr)
{
	return guest_page(f, address, nr, PRESENT | USER);
}
