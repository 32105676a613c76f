/*
 * gdt.c - a descriptor table of our own.
 *
 * Xen has its flat segments in every GDT; a page of ours in front of them is what a real kernel
 * has, and one more frame a restore has to translate, on each CPU. One descriptor: data, DPL 3.
 */
#include "gdt.h"
#include "hypercall.h"
#include "mm.h"
#include "sched.h"

#define DATA_ENTRY 1
#define DATA_SELECTOR (DATA_ENTRY << 3 | 3)
#define FLAT_DATA_DPL3 0x00cff3000000ffffUL

/* A new one; returns its mfn. */
noinline u64 gdt_alloc(void)
{
	u64 *gdt = alloc_page();

	BUG_ON(!gdt);
	gdt[DATA_ENTRY] = FLAT_DATA_DPL3;
	make_page_readonly(gdt);
	return pfn_to_mfn(virt_to_pfn(gdt));
}

noinline void gdt_init(void)
{
	static u64 frame;

	frame = gdt_alloc();
	if (HYPERVISOR_set_gdt(&frame, GDT_ENTRIES))
		panic("set_gdt refused");
	frame = 0;
}

/* Load a selector of it: a general protection fault, and the end, if the table is not there. */
void gdt_check(void)
{
	__asm__ volatile("movw %w0, %%es; movw %w1, %%es" : : "r"(DATA_SELECTOR), "r"(0));
}
