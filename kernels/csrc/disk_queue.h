/* Reads that are under way together. One thread at a time adds and starts them, under a lock of the owner; any thread
 * takes one that has arrived, and gives its room back under that lock. Where the system has no asynchronous reads, the
 * thread that takes one reads it. */
#ifndef PI_DISK_QUEUE_H
#define PI_DISK_QUEUE_H

#include "disk_read.h"

typedef struct pi_disk_queue pi_disk_queue;

enum { PI_DISK_DEPTH = 128 /* reads under way at most */ };

typedef struct {
    int64_t slot; /* as it was added; -1: none can be told */
    int error;    /* 0: none */
    const uint8_t *bytes;
} pi_disk_arrival;

/* With `bytes` of memory for what is read, whole pages. NULL with errno set. */
pi_disk_queue *pi_disk_queue_new(int64_t bytes);
/* Waits for what is under way. */
void pi_disk_queue_free(pi_disk_queue *queue);
/* Whether the system reads while no thread waits. */
int pi_disk_queue_is_asynchronous(const pi_disk_queue *queue);

/* Adds a read of `file`, which stays where it is until the read has arrived: its slot, below PI_DISK_DEPTH, or -1 where
 * there is no room now. */
int64_t pi_disk_queue_add(pi_disk_queue *queue, const pi_disk_file *file, int64_t offset, int64_t bytes);
/* Starts what was added. */
void pi_disk_queue_start(pi_disk_queue *queue);
/* Waits for one of those that were started and that no other thread has taken; 0 where there is none. */
int pi_disk_queue_take(pi_disk_queue *queue, pi_disk_arrival *arrival);
/* The bytes of a taken one are not needed any more. */
void pi_disk_queue_release(pi_disk_queue *queue, int64_t slot);

#endif
