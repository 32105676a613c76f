/* events.h - event channels, 2-level ABI. */
#ifndef XSAVE_GUEST_EVENTS_H
#define XSAVE_GUEST_EVENTS_H

#include "types.h"
#include "xen.h"

extern struct shared_info *HYPERVISOR_shared_info;

void events_init(void);
void map_shared_info(void);
void unmap_shared_info(void);
void bind_evtchn_to_handler(u32 port, void (*handler)(void));
u32 bind_ipi_to_handler(int cpu, void (*handler)(void));
void bind_virq_to_handler(u32 virq, int cpu, void (*handler)(void));
void unbind_all_handlers(void);
void unmask_all_handlers(void);
void notify_remote_via_evtchn(u32 port);
void clear_evtchn(u32 port);

#endif
