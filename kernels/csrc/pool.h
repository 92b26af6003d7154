/* A pool of threads that run one function together, with barriers and work shares inside it. */
#ifndef PI_POOL_H
#define PI_POOL_H

#include <stdint.h>

typedef struct pi_pool pi_pool;
typedef struct pi_worker pi_worker; /* one thread's side of the pool during a run */

enum { PI_MAX_THREADS = 1024, PI_SLOTS = 8 /* work shares open between two barriers */ };

typedef void (*pi_task)(void *argument, pi_worker *worker);

/* NULL with errno set when memory is short. Threads start with the first run. */
pi_pool *pi_pool_new(int threads);
/* Waits for a run in progress, then ends the threads. */
void pi_pool_free(pi_pool *pool);
int pi_pool_threads(const pi_pool *pool);
/* Runs `task` on every thread, the caller among them (as thread 0); returns when all have ended. One run at a time:
 * a second caller waits. In a forked child the threads are started anew. 0, or the errno of a thread that did not
 * start (then nothing has run). */
int pi_pool_run(pi_pool *pool, pi_task task, void *argument);

/* Never 0, and another number in a child after a fork: what a thread that is not there left marked with the parent's
 * number is free. */
unsigned pi_run_mark(void);

int pi_worker_thread(const pi_worker *worker);
int pi_worker_threads(const pi_worker *worker);
/* Returns when all threads have come here. */
void pi_barrier(pi_worker *worker);

/* Work shares. Chunks [0, chunks) are dealt to the threads as contiguous ranges; a thread that ends its own range
 * takes chunks from the next few threads. Each chunk is handed out exactly once. `slot` tells apart the shares that
 * are open between the same two barriers. */
typedef struct {
    pi_worker *worker;
    int64_t chunks;
    int slot, offset;
} pi_share;
pi_share pi_share_open(pi_worker *worker, int slot, int64_t chunks);
int64_t pi_share_next(pi_share *share); /* the chunk, or -1 when there is none left */
/* The same with one counter for all threads, in ascending order: for few and large chunks of unequal cost. */
int64_t pi_take_next(pi_worker *worker, int slot, int64_t chunks);

#endif
