/* The thread pool. Between runs the threads spin for some microseconds, then sleep on a futex; at barriers they
 * spin, then give their time slice away, then sleep, so that a busy machine slows a run but never stalls it. */
#include "pool.h"

#include "arithmetic.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LINE = 64, SPINS = 400, YIELDS = 200 };

typedef struct {
    _Alignas(LINE) _Atomic int64_t next[PI_SLOTS]; /* one line: the chunks already taken of each open share */
} share_counters;

struct pi_worker {
    _Alignas(LINE) pi_pool *pool;
    int thread;
    unsigned phase; /* barriers passed; its low bit chooses the set of counters */
    uint32_t last_run;
    pthread_t handle;
    share_counters counters[2];
};

struct pi_pool {
    _Alignas(LINE) _Atomic uint32_t run; /* number of the latest run: the word that threads sleep on between runs */
    _Atomic int32_t run_sleepers;
    pi_task task;
    void *argument;
    int stop;
    _Alignas(LINE) _Atomic int32_t arrived;
    _Alignas(LINE) _Atomic uint32_t generation; /* barriers completed */
    _Atomic int32_t barrier_sleepers;
    _Alignas(LINE) int threads;
    int started;          /* threads of this process that are alive, the caller not counted */
    unsigned process;     /* value of process_generation that the threads were started in */
    pthread_mutex_t lock; /* held for a run */
    pi_worker *workers;
};

/* Counts forks on the way from the first process to this one: threads of an older generation do not exist here. */
static _Atomic unsigned process_generation;
static pthread_mutex_t revival = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t fork_handler = PTHREAD_ONCE_INIT;

static void after_fork_in_child(void) {
    atomic_fetch_add(&process_generation, 1);
    pthread_mutex_init(&revival, NULL);
}

static void install_fork_handler(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

unsigned pi_run_mark(void) { return atomic_load(&process_generation) + 1; }

static inline void spin_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#endif
}

static void sleep_on(_Atomic uint32_t *word, uint32_t value, _Atomic int32_t *sleepers) {
    atomic_fetch_add(sleepers, 1);
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
    atomic_fetch_sub(sleepers, 1);
}

/* Stores first, then looks for sleepers; a sleeper counts itself first, then the kernel compares the word. Both
 * orders are sequentially consistent, so no wake-up is lost. */
static void change_and_wake(_Atomic uint32_t *word, uint32_t value, _Atomic int32_t *sleepers) {
    atomic_store(word, value);
    if (atomic_load(sleepers) > 0) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static void wait_for_change(_Atomic uint32_t *word, uint32_t value, _Atomic int32_t *sleepers, int yields) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return;
        spin_pause();
    }
    for (int i = 0; i < yields; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != value) return;
        sched_yield();
    }
    while (atomic_load_explicit(word, memory_order_acquire) == value) sleep_on(word, value, sleepers);
}

/* Counts this thread in; true for the last one, which has opened the barrier. `phase` advances here: the counters of
 * the next phase were last used two phases ago, and everybody has left that one, since all came to the barrier that
 * ended it. */
static int arrive(pi_worker *w) {
    pi_pool *pool = w->pool;
    w->phase++;
    for (int slot = 0; slot < PI_SLOTS; slot++)
        atomic_store_explicit(&w->counters[w->phase & 1].next[slot], 0, memory_order_relaxed);
    uint32_t generation = atomic_load_explicit(&pool->generation, memory_order_relaxed);
    if (atomic_fetch_add(&pool->arrived, 1) != pool->threads - 1) return 0;
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    change_and_wake(&pool->generation, generation + 1, &pool->barrier_sleepers);
    return 1;
}

void pi_barrier(pi_worker *w) {
    pi_pool *pool = w->pool;
    uint32_t generation = atomic_load_explicit(&pool->generation, memory_order_relaxed);
    if (!arrive(w)) wait_for_change(&pool->generation, generation, &pool->barrier_sleepers, YIELDS);
}

static void *thread_main(void *argument) {
    pi_worker *w = argument;
    pi_pool *pool = w->pool;
    prctl(PR_SET_NAME, "pi-pool"); /* so that they can be told from other threads of the process */
    pi_enter_arithmetic();
    for (;;) {
        wait_for_change(&pool->run, w->last_run, &pool->run_sleepers, 0);
        w->last_run = atomic_load_explicit(&pool->run, memory_order_acquire);
        if (pool->stop) return NULL;
        pool->task(pool->argument, w);
        arrive(w); /* no wait: the next run cannot start before the caller has seen everybody arrive */
    }
}

/* Puts the pool into the state of having no threads but the caller. */
static void reset(pi_pool *pool) {
    atomic_store(&pool->arrived, 0);
    atomic_store(&pool->generation, 0);
    atomic_store(&pool->barrier_sleepers, 0);
    atomic_store(&pool->run_sleepers, 0);
    pool->stop = 0;
    pool->started = 0;
    pool->process = atomic_load(&process_generation);
    uint32_t run = atomic_load(&pool->run);
    for (int i = 0; i < pool->threads; i++) {
        pi_worker *w = &pool->workers[i];
        memset(w, 0, sizeof *w);
        w->pool = pool;
        w->thread = i;
        w->last_run = run;
    }
}

static void stop_threads(pi_pool *pool) {
    pool->stop = 1;
    change_and_wake(&pool->run, atomic_load(&pool->run) + 1, &pool->run_sleepers);
    for (int i = 1; i <= pool->started; i++) pthread_join(pool->workers[i].handle, NULL);
    reset(pool);
}

/* 0 or an errno. The threads block every signal, which belong to the program's own threads, but those of their own
 * faults: one that is blocked then ends the process without a word. */
static int start_threads(pi_pool *pool) {
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGILL);
    sigdelset(&all, SIGFPE);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    for (int i = 1; i < pool->threads && !error; i++) {
        error = pthread_create(&pool->workers[i].handle, NULL, thread_main, &pool->workers[i]);
        if (!error) pool->started = i;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) stop_threads(pool);
    return error;
}

pi_pool *pi_pool_new(int threads) {
    pthread_once(&fork_handler, install_fork_handler);
    pi_pool *pool = aligned_alloc(LINE, sizeof(pi_pool));
    pi_worker *workers = aligned_alloc(LINE, sizeof(pi_worker) * (size_t)threads);
    if (!pool || !workers) {
        free(pool);
        free(workers);
        errno = ENOMEM;
        return NULL;
    }
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->workers = workers;
    pthread_mutex_init(&pool->lock, NULL);
    reset(pool);
    return pool;
}

/* In a forked child: forgets the parent's threads, and its lock, which a thread that is not here may have held. */
static void revive_after_fork(pi_pool *pool) {
    if (pool->process == atomic_load(&process_generation)) return;
    pthread_mutex_lock(&revival);
    if (pool->process != atomic_load(&process_generation)) {
        pthread_mutex_init(&pool->lock, NULL);
        reset(pool);
    }
    pthread_mutex_unlock(&revival);
}

void pi_pool_free(pi_pool *pool) {
    if (!pool) return;
    revive_after_fork(pool);
    pthread_mutex_lock(&pool->lock);
    if (pool->started) stop_threads(pool);
    pthread_mutex_unlock(&pool->lock);
    pthread_mutex_destroy(&pool->lock);
    free(pool->workers);
    free(pool);
}

int pi_pool_threads(const pi_pool *pool) { return pool->threads; }

int pi_pool_run(pi_pool *pool, pi_task task, void *argument) {
    revive_after_fork(pool);
    pthread_mutex_lock(&pool->lock);
    int error = pool->started < pool->threads - 1 ? start_threads(pool) : 0;
    if (!error) {
        unsigned arithmetic = pi_enter_arithmetic();
        pool->task = task;
        pool->argument = argument;
        change_and_wake(&pool->run, atomic_load(&pool->run) + 1, &pool->run_sleepers);
        task(argument, &pool->workers[0]);
        pi_barrier(&pool->workers[0]);
        pi_leave_arithmetic(arithmetic);
    }
    pthread_mutex_unlock(&pool->lock);
    return error;
}

int pi_worker_thread(const pi_worker *worker) { return worker->thread; }

int pi_worker_threads(const pi_worker *worker) { return worker->pool->threads; }

enum { VICTIMS = 4 }; /* threads, itself included, that a thread takes chunks from: enough to even out, cheap to ask */

pi_share pi_share_open(pi_worker *worker, int slot, int64_t chunks) {
    return (pi_share){.worker = worker, .chunks = chunks, .slot = slot, .offset = 0};
}

int64_t pi_share_next(pi_share *share) {
    pi_worker *w = share->worker;
    int threads = w->pool->threads;
    for (; share->offset < threads && share->offset < VICTIMS; share->offset++) {
        int owner = (w->thread + share->offset) % threads;
        int64_t begin = share->chunks * owner / threads, end = share->chunks * (owner + 1) / threads;
        _Atomic int64_t *next = &w->pool->workers[owner].counters[w->phase & 1].next[share->slot];
        if (begin + atomic_load_explicit(next, memory_order_relaxed) >= end) continue;
        int64_t chunk = begin + atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
        if (chunk < end) return chunk;
    }
    return -1;
}

int64_t pi_take_next(pi_worker *worker, int slot, int64_t chunks) {
    _Atomic int64_t *next = &worker->pool->workers[0].counters[worker->phase & 1].next[slot];
    int64_t chunk = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
    return chunk < chunks ? chunk : -1;
}
