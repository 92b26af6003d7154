#include "bandwidth.h"

#include "memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { PIECE = 256 << 10 };

typedef struct {
    const pi_kernels *kernels;
    uint8_t *data;
    int64_t pieces;
    uint64_t sum; /* of all that was read, so that reading cannot be left out */
} probe;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void touch(void *argument, pi_worker *worker) {
    const probe *p = argument;
    pi_share share = pi_share_open(worker, 0, p->pieces);
    int64_t piece;
    while ((piece = pi_share_next(&share)) >= 0) memset(p->data + piece * PIECE, 1, PIECE);
}

static void read_once(void *argument, pi_worker *worker) {
    probe *p = argument;
    pi_share share = pi_share_open(worker, 0, p->pieces);
    uint64_t sum = 0;
    int64_t piece;
    while ((piece = pi_share_next(&share)) >= 0) sum += p->kernels->read_memory(p->data + piece * PIECE, PIECE);
    __atomic_fetch_add(&p->sum, sum, __ATOMIC_RELAXED);
}

double pi_read_bandwidth(pi_pool *pool, const pi_kernels *kernels, int64_t bytes, double seconds, int huge,
                         int *error) {
    pi_memory memory;
    probe p = {.kernels = kernels, .pieces = (bytes + PIECE - 1) / PIECE};
    double best = 0, begin = now();
    if (pi_memory_map(&memory, (size_t)(p.pieces * PIECE)) < 0) {
        *error = ENOMEM;
        return 0;
    }
    p.data = memory.data;
    if (!huge) madvise(p.data, (size_t)(p.pieces * PIECE), MADV_NOHUGEPAGE);
    *error = pi_pool_run(pool, touch, &p);
    for (int pass = 0; !*error && (pass < 2 || now() < begin + seconds); pass++) {
        double before = now();
        *error = pi_pool_run(pool, read_once, &p);
        double rate = (double)(p.pieces * PIECE) / (now() - before);
        if (rate > best) best = rate;
    }
    pi_memory_unmap(&memory);
    return *error ? 0 : best;
}
