/* Anonymous memory on huge pages, for weights: fewer page-table walks where every byte is read once per token. */
#ifndef PI_MEMORY_H
#define PI_MEMORY_H

#include <stddef.h>

typedef struct {
    void *mapping, *data; /* data: aligned to 2 MiB, zeroed */
    size_t mapped;
} pi_memory;

/* 0, or -1 when there is not that much memory (address space). */
int pi_memory_map(pi_memory *memory, size_t bytes);
void pi_memory_unmap(pi_memory *memory);

#endif
