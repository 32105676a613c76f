/*
 * A program without a library, for 64 and for 32 bits: what does a guest's user space get of the
 * processor's exceptions and of its own registers?
 *
 *	probe		one line "ok NAME" or "BAD NAME" per question, then "probe: N bad"
 *	probe spin	counts in registers, without a system call for a long time, and prints
 *			"SPIN64 n ok" or "SPIN64 n BAD" (SPIN32) once in a while, for ever
 */
typedef unsigned long ulong;

#ifdef __x86_64__
#define NR_WRITE 1
#define NR_GETPID 39
#define NR_EXIT 60
#define NR_SIGACTION 13
#define NR_SIGRETURN 15
#define NR_MODIFY_LDT 154
#define CONTEXT_IP 21
#define CONTEXT_FLAGS 22
#define BITS "64"
#define WORD "q"
#define ENTER "syscall"
#define STACK "rsp"
#else
#define NR_WRITE 4
#define NR_GETPID 20
#define NR_EXIT 1
#define NR_SIGACTION 174
#define NR_SIGRETURN 173
#define NR_MODIFY_LDT 123
#define CONTEXT_IP 19
#define CONTEXT_FLAGS 21
#define BITS "32"
#define WORD "l"
#define ENTER "int $0x80"
#define STACK "esp"
#endif
#define NR32_GETPID 20
#define QUOTE(x) #x
#define NUMBER(x) QUOTE(x)

#define SIGILL 4
#define SIGTRAP 5
#define SIGFPE 8
#define SIGSEGV 11
#define SA_SIGINFO 4
#define SA_RESTORER 0x04000000

#define TRAP_TRACE 2
#define FPE_INTDIV 1
#define FPE_FLTDIV 3
#define SEGV_MAPERR 1
#define AT_SYSINFO 32

void restorer(void);
asm("restorer:\tmov $" NUMBER(NR_SIGRETURN) ", %eax\n\t" ENTER);

struct kernel_sigaction {
	void (*handler)(int sig, int *info, ulong *context);
	ulong flags;
	void (*restorer)(void);
	ulong mask[8 / sizeof(ulong)];
};

/* si_signo, si_errno, si_code, then si_addr, aligned. */
#define SI_CODE 2
#define SI_ADDR (sizeof(ulong) == 8 ? 4 : 3)

static volatile ulong resume;
static volatile int caught, caught_code;
static volatile ulong caught_address;
static int bad;

static long call(long nr, long a, long b, long c, long d)
{
	long result;

#ifdef __x86_64__
	register long r10 asm("r10") = d;

	asm volatile("syscall" : "=a"(result) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10)
		     : "rcx", "r11", "memory");
#else
	asm volatile("int $0x80" : "=a"(result) : "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d)
		     : "memory");
#endif
	return result;
}

/* Whole lines, that nothing of another program comes between. */
static void say(const char *text)
{
	static char line[160];
	static ulong length;

	for (; *text; text++) {
		line[length++] = *text;
		if (*text == '\n' || length == sizeof(line)) {
			call(NR_WRITE, 1, (long)line, length, 0);
			length = 0;
		}
	}
}

static void say_number(ulong number)
{
	char text[24], *at = text + sizeof(text) - 1;

	*at = 0;
	do {
		*--at = '0' + number % 10;
		number /= 10;
	} while (number);
	say(at);
}

static void check(const char *name, int ok)
{
	say(ok ? "ok " : "BAD ");
	say(name);
	if (!ok) {
		say(": signal ");
		say_number(caught);
		say(" code ");
		say_number(caught_code);
		say(" address ");
		say_number(caught_address);
		bad++;
	}
	say("\n");
}

/* Note what came, and go on where the statement said. */
static void handler(int sig, int *info, ulong *context)
{
	caught = sig;
	caught_code = info[SI_CODE];
	caught_address = *(ulong *)(info + SI_ADDR);
	context[CONTEXT_IP] = resume;
	context[CONTEXT_FLAGS] &= ~0x100ul; /* no more single steps */
}

/* The signal that the instructions bring about; 0 if they bring about none. */
#define SIGNAL(code, ...)                                                       \
	({                                                                     \
		caught = 0;                                                    \
		asm volatile("mov" WORD " $9f, %0\n\t" code "\n9:"             \
			     : "=m"(resume) : __VA_ARGS__ : "memory", "cc"); \
		caught;                                                        \
	})

static void catch(int sig)
{
	struct kernel_sigaction action = {
		.handler = handler,
		.flags = SA_SIGINFO | SA_RESTORER,
		.restorer = restorer,
	};

	call(NR_SIGACTION, sig, (long)&action, 0, sizeof(action.mask));
}

static int faults(ulong address, int store)
{
	if (store)
		return SIGNAL("movb $1, (%1)", "r"(address));
	return SIGNAL("movb (%1), %%al", "r"(address), "a"(0));
}

static void memory(void)
{
	check("store to nowhere", faults(0x10, 1) == SIGSEGV && caught_address == 0x10 &&
	      caught_code == SEGV_MAPERR);
	check("load from nowhere", faults(0x2010, 0) == SIGSEGV && caught_address == 0x2010);
#ifdef __x86_64__
	check("load from the kernel", faults(0xffffffff81000000, 0) == SIGSEGV);
	check("load from Xen", faults(0xffff808000000000, 0) == SIGSEGV);
	check("no canonical address", faults(0x8000000000000000, 0) == SIGSEGV);
#else
	check("load from the highest page", faults(0xfffff000, 0) == SIGSEGV);
#endif
}

static void arithmetic(void)
{
	static const unsigned short unmasked = 0x37b; /* all but division by zero */

	check("division by zero",
	      SIGNAL("div %1", "r"(0), "a"(1), "d"(0)) == SIGFPE && caught_code == FPE_INTDIV);
	check("x87 division by zero",
	      SIGNAL("fldcw %1\n\tfld1\n\tfldz\n\tfdivrp\n\tfwait", "m"(unmasked)) == SIGFPE &&
	      caught_code == FPE_FLTDIV);
	check("no x87 exception left", SIGNAL("fninit\n\tfld1\n\tfwait\n\tfstp %%st(0)") == 0);
}

static void traps(void)
{
	check("ud2", SIGNAL("ud2") == SIGILL);
	check("int3", SIGNAL("int3") == SIGTRAP);
	check("a gate that is closed", SIGNAL("int $0x81") == SIGSEGV);
	check("a gate of exceptions", SIGNAL("int $14") == SIGSEGV);
	check("hlt", SIGNAL("hlt") == SIGSEGV);
	check("cli", SIGNAL("cli") == SIGSEGV);
	check("rdrand, which is hidden", SIGNAL("rdrand %%eax") == SIGILL);
	check("AVX, which is hidden", SIGNAL("vaddps %%xmm0, %%xmm1, %%xmm2") == SIGILL);
	check("single step", SIGNAL("pushf\n\tor" WORD " $0x100, (%%" STACK ")\n\tpopf\n\t"
				    "nop\n\tnop") == SIGTRAP && caught_code == TRAP_TRACE);
}

/* The value of an auxiliary vector's entry: behind arguments and environment, each with a 0. */
static __attribute__((unused)) ulong auxiliary(ulong *at, ulong type)
{
	at += *at + 2;
	while (*at++)
		;
	while (*at && *at != type)
		at += 2;
	return at[1];
}

static void system_calls(ulong *arguments)
{
	static ulong stack; /* its upper half is lost in 32-bit code */
	long pid = call(NR_GETPID, 0, 0, 0, 0), other = 0;

	(void)arguments;
	check("system call", pid > 0);
	asm volatile("int $0x80" : "=a"(other) : "a"(NR32_GETPID) : "memory");
	check("int 0x80", other == pid);
#ifdef __x86_64__
	/* Into a code segment of 32 bits and back. */
	other = 0;
	asm volatile("mov %%rsp, %3\n\t"
		     "push $0x23\n\t"
		     "push $1f\n\t"
		     "lretq\n"
		     ".code32\n"
		     "1:\tint $0x80\n\t"
		     "inc %%ecx\n\t"
		     "ljmp $0x33, $2f\n"
		     ".code64\n"
		     "2:\tmov %3, %%rsp"
		     : "=a"(other), "+c"(pid) : "a"(NR32_GETPID), "m"(stack) : "memory");
	check("32-bit code in between", other == pid - 1);
#else
	/* The vdso's way: syscall, sysenter or int 0x80, as the processor has it. */
	stack = auxiliary(arguments, AT_SYSINFO);
	asm volatile("call *%2" : "=a"(other) : "a"(NR_GETPID), "m"(stack) : "memory");
	check("the vdso", stack && other == pid);
#endif
}

/* struct user_desc; 0x51: of 32 bits, its limit in pages, usable; 2 << 1: code. */
static long set_ldt(unsigned entry, ulong base, unsigned flags)
{
	unsigned descriptor[4] = { entry, base, 0xfffff, flags };

	return call(NR_MODIFY_LDT, 0x11, (long)descriptor, sizeof(descriptor), 0);
}

static unsigned read_gs(unsigned entry)
{
	unsigned value, old;

	asm volatile("mov %%gs, %1\n\tmov %2, %%gs\n\tmov %%gs:0, %0\n\tmov %1, %%gs"
		     : "=&r"(value), "=&r"(old) : "r"(entry << 3 | 7));
	return value;
}

static void local_descriptors(void)
{
	static unsigned words[2] = { 0x12345678, 0x9abcdef0 };
	int result = 0;

	check("no local descriptor", SIGNAL("mov %1, %%gs", "r"(0xf)) == SIGSEGV);
	check("modify_ldt", !set_ldt(1, (ulong)words, 0x51) && !set_ldt(700, (ulong)(words + 1), 0x51));
	check("a local descriptor", read_gs(1) == words[0]);
	check("one of another page", read_gs(700) == words[1]);
	check("one changed", !set_ldt(1, (ulong)(words + 1), 0x51) && read_gs(1) == words[1]);
	check("one that is not there", SIGNAL("mov %1, %%gs", "r"(0x1f)) == SIGSEGV);
	/* Code of 32 bits, and of which the kernel is asked in between. */
	check("code of its own", !set_ldt(3, 0, 0x51 | 2 << 1));
#ifdef __x86_64__
	static ulong stack;

	asm volatile("mov %%rsp, %1\n\tpush $0x1f\n\tpush $1f\n\tlretq\n"
		     ".code32\n1:\tint $0x80\n\tmov $7, %0\n\tljmp $0x33, $2f\n"
		     ".code64\n2:\tmov %1, %%rsp"
		     : "=&c"(result), "=m"(stack) : "a"(NR32_GETPID) : "memory");
#else
	asm volatile("push %%cs\n\tpush $2f\n\tljmp $0x1f, $1f\n"
		     "1:\tint $0x80\n\tmov $7, %0\n\tlret\n2:"
		     : "=&c"(result) : "a"(NR32_GETPID) : "memory");
#endif
	check("a system call from there", result == 7);
}

/*
 * Three counters in lockstep, one of them in memory, a product, and two floating-point registers
 * that nobody else touches.
 */
static int lockstep(ulong rounds)
{
	static volatile ulong in_memory;
	ulong a = 0, b = 7, c = 0;
	double kept = 0;

	in_memory = 0;
	asm volatile("fld1\n\tfldpi\n\tcvtsi2sd %5, %%xmm7\n"
		     "1:\tadd $1, %0\n\t"
		     "add $3, %1\n\t"
		     "sub $1, %2\n\t"
#ifdef __x86_64__
		     "addq $1, %3\n\t"
#else
		     "addl $1, %3\n\t"
#endif
		     "cmp %0, %5\n\t"
		     "jne 1b\n\t"
		     "fldpi\n\tfsubrp\n\tfaddp\n\tfstpl %4\n\t"
		     "cvtsd2si %%xmm7, %1\n\tsub %0, %1\n\tadd $7, %1\n\tadd %0, %1\n\t"
		     "add %0, %1\n\tadd %0, %1"
		     : "+&r"(a), "+&r"(b), "+&r"(c), "+m"(in_memory), "=m"(kept)
		     : "r"(rounds) : "xmm7", "cc", "memory");
	return a == rounds && b == 7 + 3 * rounds && a + c == 0 && in_memory == rounds &&
	       kept == 1;
}

static void spin(void)
{
	for (ulong n = 1;; n++) {
		int ok = lockstep(100 * 1000 * 1000);

		say("SPIN" BITS " ");
		say_number(n);
		say(ok ? " ok\n" : " BAD\n");
	}
}

void start(ulong *arguments)
{
	if (*arguments > 1)
		spin();
	catch(SIGILL);
	catch(SIGTRAP);
	catch(SIGFPE);
	catch(SIGSEGV);
	memory();
	arithmetic();
	traps();
	system_calls(arguments);
	local_descriptors();
	check("registers", lockstep(1000 * 1000));
	say("probe: ");
	say_number(bad);
	say(" bad\n");
	call(NR_EXIT, bad, 0, 0, 0);
}

#ifdef __x86_64__
asm(".globl _start\n_start:\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start");
#else
asm(".globl _start\n_start:\tmov %esp, %eax\n\tand $-16, %esp\n\tsub $12, %esp\n\tpush %eax\n\tcall start");
#endif
