/* writer.h - the thread that dirties memory. */
#ifndef XSAVE_GUEST_WRITER_H
#define XSAVE_GUEST_WRITER_H

#include "types.h"

u64 writer_size(void);
void writer_init(u64 first_pfn, u64 nr_pages);
void writer_start(void);

#endif
