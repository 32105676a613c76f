/* events.h - event channels (2-level ABI), and the irqs that are made of them. */
#ifndef XSAVE_GUEST_EVENTS_H
#define XSAVE_GUEST_EVENTS_H

#include "types.h"
#include "xen.h"

/* events.c: shared_info, and ports */
extern struct shared_info *HYPERVISOR_shared_info;
void events_init(void);
void map_shared_info(void);
void unmap_shared_info(void);
void notify_remote_via_evtchn(u32 port);
void clear_evtchn(u32 port);
int mask_evtchn(u32 port);
int set_evtchn(u32 port);
void unmask_evtchn(u32 port);

/* irq.c */
int bind_evtchn_to_irqhandler(u32 port, void (*handler)(void));
int bind_virq_to_irqhandler(u32 virq, int cpu, void (*handler)(void));
int bind_ipi_to_irqhandler(int cpu, void (*handler)(void));
void rebind_evtchn_irq(u32 port, int irq);
void unbind_from_irq(int irq);
int retrigger_irq(int irq);
u32 evtchn_from_irq(int irq);
void notify_remote_via_irq(int irq);
void xen_irq_resume(void);
void handle_evtchn(u32 port);

#endif
