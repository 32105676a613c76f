/* kernel.h - what every file may use: memory and string helpers, lists, printk, panic. */
#ifndef XSAVE_GUEST_KERNEL_H
#define XSAVE_GUEST_KERNEL_H

#include "types.h"

#define NSEC_PER_MSEC 1000000UL
#define NSEC_PER_SEC 1000000000UL

/* lib.c */
void *memset(void *dst, int c, u64 n);
void *memcpy(void *dst, const void *src, u64 n);
int memcmp(const void *a, const void *b, u64 n);
u64 strlen(const char *s);
int strcmp(const char *a, const char *b);
int strncmp(const char *a, const char *b, u64 n);
int snprintf(char *buf, u64 size, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
int vsnprintf(char *buf, u64 size, const char *fmt, __builtin_va_list args);
u64 memparse(const char *s, const char **end);
u64 hash64(u64 x);

/* console.c */
void printk(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* traps.c */
struct pt_regs;
noreturn void panic(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void trap_init(void);

#define BUG_ON(cond)                                                             \
	do {                                                                     \
		if (unlikely(cond))                                              \
			panic("BUG at %s:%d: %s", __FILE__, __LINE__, #cond);    \
	} while (0)

/* main.c */
extern struct start_info *xen_start_info;
const char *cmdline_find(const char *key);
u64 cmdline_number(const char *key, u64 otherwise);
int cmdline_is(const char *key, const char *value);

/* Doubly linked list, the head being an element of it. */
struct list_head {
	struct list_head *next, *prev;
};

#define LIST_HEAD_INIT(name) { &(name), &(name) }

static inline void INIT_LIST_HEAD(struct list_head *head)
{
	head->next = head->prev = head;
}

static inline int list_empty(const struct list_head *head)
{
	return head->next == head;
}

static inline void list_add_tail(struct list_head *item, struct list_head *head)
{
	item->prev = head->prev;
	item->next = head;
	head->prev->next = item;
	head->prev = item;
}

static inline void list_del_init(struct list_head *item)
{
	item->prev->next = item->next;
	item->next->prev = item->prev;
	INIT_LIST_HEAD(item);
}

#define list_for_each_entry(pos, head, member)                                  \
	for (pos = container_of((head)->next, __typeof__(*pos), member);        \
	     &pos->member != (head);                                            \
	     pos = container_of(pos->member.next, __typeof__(*pos), member))

#endif
