/* Chooses the instruction sets that this CPU and its operating system support, flag by flag. */
#include "kernels.h"

extern const pi_kernels pi_kernels_scalar;
#ifdef PI_HAS_AVX2
extern const pi_kernels pi_kernels_avx2;
#endif
#ifdef PI_HAS_AVXVNNI
extern const pi_kernels pi_kernels_avxvnni;
#endif
#ifdef PI_HAS_AVX512
extern const pi_kernels pi_kernels_avx512;
#endif
#ifdef PI_HAS_NEON
extern const pi_kernels pi_kernels_neon;
#endif

#if defined(PI_HAS_AVX2) || defined(PI_HAS_AVX512)
#include <cpuid.h>

enum { XCR0_SSE_AVX = 0x06, XCR0_AVX512 = 0xe6 }; /* register state that the operating system saves */

typedef struct {
    unsigned leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_1_eax, xcr0;
} cpu_flags;

static cpu_flags read_cpu_flags(void) {
    cpu_flags flags = {0};
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return flags;
    flags.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        flags.leaf7_ebx = ebx;
        flags.leaf7_ecx = ecx;
        if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) flags.leaf7_1_eax = eax;
    }
    if (flags.leaf1_ecx & bit_OSXSAVE) {
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        flags.xcr0 = low;
    }
    return flags;
}

static int has(unsigned word, unsigned bits) { return (word & bits) == bits; }

/* inline: a build of few instruction sets leaves some of these unused. */
static inline int has_avx2(cpu_flags f) {
    return has(f.xcr0, XCR0_SSE_AVX) && has(f.leaf1_ecx, bit_AVX | bit_FMA | bit_F16C) && has(f.leaf7_ebx, bit_AVX2);
}

enum { LEAF7_1_AVXVNNI = 1 << 4 }; /* older compilers have no name for it */

static inline int has_avxvnni(cpu_flags f) { return has_avx2(f) && has(f.leaf7_1_eax, LEAF7_1_AVXVNNI); }

static inline int has_avx512(cpu_flags f) {
    return has_avx2(f) && has(f.xcr0, XCR0_AVX512) &&
           has(f.leaf7_ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) &&
           has(f.leaf7_ecx, bit_AVX512VNNI);
}
#endif

#ifdef PI_HAS_NEON
#include <asm/hwcap.h>
#include <sys/auxv.h>

static int has_neon(void) {
    unsigned long wanted = HWCAP_ASIMD | HWCAP_ASIMDDP | HWCAP_FPHP | HWCAP_ASIMDHP;
    return (getauxval(AT_HWCAP) & wanted) == wanted;
}
#endif

const pi_kernels *const *pi_available_kernels(void) {
    static const pi_kernels *list[6]; /* every caller writes the same values: a race is harmless */
    int count = 0;
#if defined(PI_HAS_AVX2) || defined(PI_HAS_AVX512)
    cpu_flags flags = read_cpu_flags();
#endif
#ifdef PI_HAS_AVX512
    if (has_avx512(flags)) list[count++] = &pi_kernels_avx512;
#endif
#ifdef PI_HAS_AVXVNNI
    if (has_avxvnni(flags)) list[count++] = &pi_kernels_avxvnni;
#endif
#ifdef PI_HAS_AVX2
    if (has_avx2(flags)) list[count++] = &pi_kernels_avx2;
#endif
#ifdef PI_HAS_NEON
    if (has_neon()) list[count++] = &pi_kernels_neon;
#endif
    list[count] = &pi_kernels_scalar;
    return list;
}
