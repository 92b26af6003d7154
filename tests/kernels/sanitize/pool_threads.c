/* The thread pool under ThreadSanitizer: every path of pool.c on which threads meet. Ends with 0, or says what is wrong.
 * Built and run by scripts/sanitize.sh. */
#include "pool.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 4, CHUNKS = 97, ROUNDS = 5, RUNS = 100 };

typedef struct {
    int64_t taken[ROUNDS][2][CHUNKS]; /* plain: each chunk belongs to the one thread that got it */
    int64_t sums[ROUNDS];
} job;

static void fail(const char *what) {
    fprintf(stderr, "pool: %s\n", what);
    exit(1);
}

/* Fills by work shares, reads after the barrier what other threads have written, and fills again. */
static void task(void *argument, pi_worker *worker) {
    job *j = argument;
    for (int round = 0; round < ROUNDS; round++) {
        pi_share share = pi_share_open(worker, 0, CHUNKS);
        int64_t chunk;
        while ((chunk = pi_share_next(&share)) >= 0) j->taken[round][0][chunk]++;
        while ((chunk = pi_take_next(worker, 1, CHUNKS)) >= 0) j->taken[round][1][chunk]++;
        pi_barrier(worker);
        if (pi_worker_thread(worker) == round % pi_worker_threads(worker))
            for (int i = 0; i < CHUNKS; i++) j->sums[round] += j->taken[round][0][i] + j->taken[round][1][i];
        pi_barrier(worker);
    }
}

static void check_run(pi_pool *pool) {
    job *j = calloc(1, sizeof *j);
    if (!j) fail("no memory");
    if (pi_pool_run(pool, task, j)) fail("a thread did not start");
    for (int round = 0; round < ROUNDS; round++)
        if (j->sums[round] != 2 * CHUNKS) fail("a chunk was handed out twice or not at all");
    free(j);
}

static void *caller(void *pool) {
    for (int i = 0; i < RUNS; i++) check_run(pool);
    return NULL;
}

/* Several threads of the program use one pool: runs wait for each other. */
static void check_callers(pi_pool *pool) {
    pthread_t callers[3];
    for (int i = 0; i < 3; i++)
        if (pthread_create(&callers[i], NULL, caller, pool)) fail("pthread_create");
    for (int i = 0; i < 3; i++) pthread_join(callers[i], NULL);
}

static void check_sleepers(pi_pool *pool) {
    for (int i = 0; i < 20; i++) {
        usleep(2000); /* long enough for the threads to sleep */
        check_run(pool);
    }
}

int main(void) {
    for (int threads = 1; threads <= THREADS; threads++) {
        pi_pool *pool = pi_pool_new(threads);
        if (!pool) fail("no memory");
        check_run(pool);
        check_callers(pool);
        check_sleepers(pool);
        pi_pool_free(pool);
        pi_pool_free(pi_pool_new(threads)); /* one that never ran */
    }
    puts("pool: no fault");
    return 0;
}
