#include "disk_queue.h"

#include "memory.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    const pi_disk_file *file;
    int64_t offset, bytes;
    pi_disk_hull hull;
    uint8_t *at;
    int64_t end; /* of its bytes, counted from the first read on */
    int released;
    struct iocb call;
} disk_read;

/* Bytes of the ring, and slots, are given in turn and taken back in the same order. */
struct pi_disk_queue {
    pi_memory memory;
    int64_t room, begin, end;      /* of the ring: its size, and what of it is in use, counted on and on */
    int64_t first, started, added; /* slots, counted likewise */
    disk_read reads[PI_DISK_DEPTH];
    _Atomic int64_t untaken; /* started, and no thread has come for them yet */
    aio_context_t context;
    int asynchronous;
    pthread_mutex_t lock;                                    /* of `unread` */
    int64_t unread[PI_DISK_DEPTH], unread_begin, unread_end; /* slots that the thread that takes them reads */
    pid_t process;
};

pi_disk_queue *pi_disk_queue_new(int64_t bytes) {
    pi_disk_queue *q = calloc(1, sizeof *q);
    if (!q) return NULL;
    q->room = bytes;
    q->process = getpid();
    if (pi_memory_map(&q->memory, (size_t)bytes) < 0) {
        free(q);
        errno = ENOMEM;
        return NULL;
    }
    pthread_mutex_init(&q->lock, NULL);
    q->asynchronous = syscall(SYS_io_setup, PI_DISK_DEPTH, &q->context) == 0;
    return q;
}

void pi_disk_queue_free(pi_disk_queue *q) {
    if (!q) return;
    if (q->asynchronous && q->process == getpid()) syscall(SYS_io_destroy, q->context);
    pi_memory_unmap(&q->memory);
    pthread_mutex_destroy(&q->lock);
    free(q);
}

int pi_disk_queue_is_asynchronous(const pi_disk_queue *q) { return q->asynchronous; }

int64_t pi_disk_queue_add(pi_disk_queue *q, const pi_disk_file *file, int64_t offset, int64_t bytes) {
    const pi_disk_hull hull = pi_disk_hull_of(file, offset, bytes);
    const int64_t length = (hull.bytes + PI_PAGE - 1) / PI_PAGE * PI_PAGE;
    if (q->first == q->added) q->begin = q->end = 0;
    int64_t at = q->end;
    if (at % q->room + length > q->room) at += q->room - at % q->room;
    if (q->added - q->first == PI_DISK_DEPTH || at + length - q->begin > q->room) return -1;
    const int64_t slot = q->added++ % PI_DISK_DEPTH;
    q->end = at + length;
    q->reads[slot] = (disk_read){.file = file,
                                 .offset = offset,
                                 .bytes = bytes,
                                 .hull = hull,
                                 .at = (uint8_t *)q->memory.data + at % q->room,
                                 .end = q->end};
    q->reads[slot].call = (struct iocb){.aio_data = (uint64_t)slot,
                                        .aio_lio_opcode = IOCB_CMD_PREAD,
                                        .aio_fildes = (uint32_t)file->descriptor,
                                        .aio_buf = (uint64_t)(uintptr_t)q->reads[slot].at,
                                        .aio_nbytes = (uint64_t)hull.bytes,
                                        .aio_offset = hull.first};
    return slot;
}

/* Those that the system does not take, for whatever reason, are read by the threads that take them. */
static void leave_unread(pi_disk_queue *q, int64_t begin, int64_t end) {
    pthread_mutex_lock(&q->lock);
    for (; begin < end; begin++) q->unread[q->unread_end++ % PI_DISK_DEPTH] = begin % PI_DISK_DEPTH;
    pthread_mutex_unlock(&q->lock);
}

void pi_disk_queue_start(pi_disk_queue *q) {
    struct iocb *calls[PI_DISK_DEPTH];
    const int64_t count = q->added - q->started;
    long done = 0;
    for (int64_t i = 0; i < count; i++) calls[i] = &q->reads[(q->started + i) % PI_DISK_DEPTH].call;
    while (q->asynchronous && done < count) {
        const long more = syscall(SYS_io_submit, q->context, count - done, calls + done);
        if (more < 0 && errno == EINTR) continue;
        if (more <= 0) break;
        done += more;
    }
    if (done < count) leave_unread(q, q->started + done, q->added);
    q->started = q->added;
    atomic_fetch_add(&q->untaken, count);
}

static int64_t next_unread(pi_disk_queue *q) {
    pthread_mutex_lock(&q->lock);
    const int64_t slot = q->unread_begin < q->unread_end ? q->unread[q->unread_begin++ % PI_DISK_DEPTH] : -1;
    pthread_mutex_unlock(&q->lock);
    return slot;
}

/* As many threads wait for the system as it has reads to tell of: those that come for one find it among the unread, or
 * it has been started. */
int pi_disk_queue_take(pi_disk_queue *q, pi_disk_arrival *arrival) {
    int64_t untaken = atomic_load(&q->untaken), received = -1;
    do {
        if (untaken <= 0) return 0;
    } while (!atomic_compare_exchange_weak(&q->untaken, &untaken, untaken - 1));
    *arrival = (pi_disk_arrival){.slot = next_unread(q)};
    if (arrival->slot < 0) {
        struct io_event event;
        long count;
        do count = syscall(SYS_io_getevents, q->context, 1L, 1L, &event, NULL);
        while (count == 0 || (count < 0 && errno == EINTR));
        if (count < 0) {
            arrival->error = errno;
            return 1;
        }
        arrival->slot = (int64_t)event.data;
        received = event.res;
        if (received < 0) arrival->error = (int)-received;
    }
    const disk_read *r = &q->reads[arrival->slot];
    if (arrival->error) return 1;
    if (received < r->hull.skip + r->bytes) { /* not read, or cut short: read on, or find out why not */
        arrival->error = pi_disk_read(r->file, r->offset, r->bytes, r->at, &arrival->bytes);
        return 1;
    }
    arrival->bytes = r->at + r->hull.skip;
    arrival->error = pi_disk_finish(r->file, r->hull);
    return 1;
}

void pi_disk_queue_release(pi_disk_queue *q, int64_t slot) {
    q->reads[slot].released = 1;
    for (; q->first < q->added && q->reads[q->first % PI_DISK_DEPTH].released; q->first++)
        q->begin = q->reads[q->first % PI_DISK_DEPTH].end;
}
