/* types.h - the fixed-width integers, and the few compiler words used everywhere. */
#ifndef XSAVE_GUEST_TYPES_H
#define XSAVE_GUEST_TYPES_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef signed char s8;
typedef int s32;
typedef long s64;

#define NULL ((void *)0)
#define noinline __attribute__((noinline))
#define noreturn __attribute__((noreturn))
#define __page_aligned __attribute__((aligned(4096)))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define offsetof(type, member) __builtin_offsetof(type, member)
#define container_of(ptr, type, member) ((type *)((char *)(ptr) - offsetof(type, member)))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))

#define barrier() __asm__ volatile("" ::: "memory")
/* x86 keeps loads and stores in order; only the compiler has to be told. */
#define rmb() barrier()
#define wmb() barrier()
#define mb() __asm__ volatile("lock; addl $0, -4(%%rsp)" ::: "memory", "cc")

#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile __typeof__(x) *)&(x) = (v))

#endif
