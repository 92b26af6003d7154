#include "memory.h"

#include <stdint.h>
#include <sys/mman.h>

enum { HUGE_PAGE = 2 << 20 };

int pi_memory_map(pi_memory *memory, size_t bytes) {
    *memory = (pi_memory){0};
    if (bytes > SIZE_MAX / 2) return -1;
    /* Small matrices share no huge page: rounding each up to 2 MiB would cost more than it gives. */
    size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096, mapped = bytes + alignment;
    void *mapping = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return -1;
    uintptr_t start = ((uintptr_t)mapping + alignment - 1) / alignment * alignment;
    *memory = (pi_memory){.mapping = mapping, .data = (void *)start, .mapped = mapped};
    if (alignment == HUGE_PAGE) madvise(memory->data, bytes, MADV_HUGEPAGE); /* advice: without it only slower */
    return 0;
}

void pi_memory_unmap(pi_memory *memory) {
    if (memory->mapping) munmap(memory->mapping, memory->mapped);
    *memory = (pi_memory){0};
}
