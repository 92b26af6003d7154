/* How threads of ours round, whatever the embedding program set for its own. */
#ifndef PI_ARITHMETIC_H
#define PI_ARITHMETIC_H

#include <stdint.h>

/* Round to nearest, denormals kept, exceptions masked; returns what there was before. */
#if defined(__x86_64__)
static inline unsigned pi_enter_arithmetic(void) {
    unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80);
    return before;
}
static inline void pi_leave_arithmetic(unsigned before) { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
static inline unsigned pi_enter_arithmetic(void) {
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)0));
    return (unsigned)before;
}
static inline void pi_leave_arithmetic(unsigned before) { __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)before)); }
#else
static inline unsigned pi_enter_arithmetic(void) { return 0; }
static inline void pi_leave_arithmetic(unsigned before) { (void)before; }
#endif

#endif
