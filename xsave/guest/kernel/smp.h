/* smp.h - the other vCPUs: bring-up, messages between CPUs, stopping them all. */
#ifndef XSAVE_GUEST_SMP_H
#define XSAVE_GUEST_SMP_H

#include "percpu.h"

/* smp.c */
void cpu_init(void);
void smp_init(void);
void xen_vcpu_setup(struct cpu *cpu);
void xen_vcpu_restore(void);

/* ipi.c */
void bind_ipis(struct cpu *cpu);
void smp_send_reschedule(struct cpu *cpu);
void on_each_cpu(void (*fn)(void));

/* stop_machine.c */
void stop_machine_init(void);
int stop_machine(int (*fn)(void *), void *data);

#endif
