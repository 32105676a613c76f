/*
 * lib.c - memory, strings, formatting, and the one mixing function all patterns are made of.
 *
 * rep string instructions: on hardware and on the emulator alike they beat a C loop, and they
 * leave no copy of what they move in other registers.
 */
#include "kernel.h"

void *memset(void *dst, int c, u64 n)
{
	u64 word = (u8)c * 0x0101010101010101UL, tail = n & 7, words = n >> 3;
	void *d = dst;

	__asm__ volatile("rep stosq" : "+D"(d), "+c"(words) : "a"(word) : "memory");
	__asm__ volatile("rep stosb" : "+D"(d), "+c"(tail) : "a"(word) : "memory");
	return dst;
}

void *memcpy(void *dst, const void *src, u64 n)
{
	u64 tail = n & 7, words = n >> 3;
	void *d = dst;

	__asm__ volatile("rep movsq" : "+D"(d), "+S"(src), "+c"(words) : : "memory");
	__asm__ volatile("rep movsb" : "+D"(d), "+S"(src), "+c"(tail) : : "memory");
	return dst;
}

int memcmp(const void *a, const void *b, u64 n)
{
	const u8 *p = a, *q = b;

	for (; n; n--, p++, q++)
		if (*p != *q)
			return *p - *q;
	return 0;
}

u64 strlen(const char *s)
{
	const char *p = s;

	while (*p)
		p++;
	return p - s;
}

int strncmp(const char *a, const char *b, u64 n)
{
	for (; n; n--, a++, b++)
		if (*a != *b || !*a)
			return (u8)*a - (u8)*b;
	return 0;
}

int strcmp(const char *a, const char *b)
{
	return strncmp(a, b, ~0UL);
}

/* A decimal number with an optional K, M or G behind it. */
u64 memparse(const char *s, const char **end)
{
	u64 value = 0;
	int shift;

	for (; *s >= '0' && *s <= '9'; s++)
		value = value * 10 + (*s - '0');
	switch (*s) {
	case 'k': case 'K': shift = 10; break;
	case 'm': case 'M': shift = 20; break;
	case 'g': case 'G': shift = 30; break;
	default: shift = 0;
	}
	if (end)
		*end = s + !!shift;
	return value << shift;
}

/* The finaliser of SplitMix64 (public domain): one to one on 64 bits, so never twice the same. */
u64 hash64(u64 x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9UL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebUL;
	return x ^ x >> 31;
}

/* Write `value` in `base`, at least `width` digits wide; returns the end of the text in buf. */
static char *put_number(char *buf, u64 value, unsigned int base, int width, char pad)
{
	char digits[24];
	int n = 0;

	do {
		digits[n++] = "0123456789abcdef"[value % base];
		value /= base;
	} while (value);
	for (; width > n; width--)
		*buf++ = pad;
	while (n)
		*buf++ = digits[--n];
	return buf;
}

struct out {
	char *buf;
	u64 used, size;
};

static void put(struct out *o, const char *s, u64 n)
{
	for (; n && o->used + 1 < o->size; n--)
		o->buf[o->used++] = *s++;
}

/* Fetch the next argument as 64 bits, sign extended where asked. */
#define NEXT_ARG(args, is_long, is_signed)                                      \
	((is_long) ? va_arg_u64(args)                                           \
	 : (is_signed) ? (u64)(s64)__builtin_va_arg(args, int)                  \
		       : (u64)__builtin_va_arg(args, unsigned int))
#define va_arg_u64(args) __builtin_va_arg(args, u64)

/* The subset of printf in use here: %[0][width][l]{d,u,x}, %s, %c, %p, %%. */
int vsnprintf(char *buf, u64 size, const char *fmt, __builtin_va_list args)
{
	struct out o = { buf, 0, size };
	char number[48], *end, pad;
	int is_long, width;
	const char *s;
	u64 value;

	for (; *fmt; fmt++) {
		if (*fmt != '%') {
			put(&o, fmt, 1);
			continue;
		}
		fmt++;
		pad = *fmt == '0' ? '0' : ' ';
		for (width = 0; *fmt >= '0' && *fmt <= '9'; fmt++)
			width = min(width * 10 + (*fmt - '0'), 20);
		for (is_long = 0; *fmt == 'l'; fmt++)
			is_long = 1;
		end = number;
		switch (*fmt) {
		case 'd':
			value = NEXT_ARG(args, is_long, 1);
			if ((s64)value < 0) {
				*end++ = '-';
				value = -value;
			}
			end = put_number(end, value, 10, width, pad);
			break;
		case 'u':
			end = put_number(end, NEXT_ARG(args, is_long, 0), 10, width, pad);
			break;
		case 'x':
			end = put_number(end, NEXT_ARG(args, is_long, 0), 16, width, pad);
			break;
		case 'p':
			end = put_number(end, va_arg_u64(args), 16, 16, '0');
			break;
		case 's':
			s = __builtin_va_arg(args, const char *);
			put(&o, s, strlen(s));
			break;
		case 'c':
			*end++ = (char)__builtin_va_arg(args, int);
			break;
		default:
			*end++ = *fmt;
		}
		put(&o, number, end - number);
	}
	if (size)
		buf[o.used] = 0;
	return (int)o.used;
}

int snprintf(char *buf, u64 size, const char *fmt, ...)
{
	__builtin_va_list args;
	int n;

	__builtin_va_start(args, fmt);
	n = vsnprintf(buf, size, fmt, args);
	__builtin_va_end(args);
	return n;
}
