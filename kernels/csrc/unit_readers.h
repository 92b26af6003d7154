/* What units.c (slots and fetching) and unit_readers.c (queues and threads) share. */
#ifndef PI_UNIT_READERS_H
#define PI_UNIT_READERS_H

#include "units.h"

#include <pthread.h>

typedef enum { ABSENT, COMING, HERE } pi_unit_state;

typedef struct {
    pi_unit_spec is;
    pi_unit_state state;
    int32_t slot;
    int32_t part, left;      /* COMING: the part that is handed out next, and pieces that are not in the slot yet */
    int64_t tile;            /* the first tile of that part that is not handed out */
    int fixed, pinned;       /* keeps its slot always, or until the next fetch */
    int expected, was_ahead; /* read ahead for the next fetch of its group */
    int64_t next;            /* in its queue */
    int64_t mark;            /* the pass that has seen it */
    int64_t count;           /* tokens of that pass that take it */
    int64_t taken;
    double use;
} unit;

typedef struct {         /* units whose pieces are still to be handed out, in order */
    int64_t first, last; /* -1: empty */
} queue;

typedef struct {
    pi_slot_kind_spec is;
    pi_memory memory;
    int32_t *free; /* a stack of slot numbers */
    int64_t free_count;
    int64_t *holder; /* the unit of each slot, -1 */
} slot_kind;

struct pi_units {
    pthread_mutex_t lock;
    pthread_cond_t work, arrived; /* for the readers; for who waits */
    pi_disk_file *files;
    slot_kind *kinds;
    unit *units;
    pi_unit_part *parts;
    int file_count, kind_count;
    int64_t count;
    queue now, ahead;
    int64_t *pinned; /* of the fetch before */
    int64_t pinned_count;
    int64_t pass;
    double tokens;       /* decide how much a use counts: 2^(tokens / half_life) */
    int64_t first_group; /* the group whose fetch advances `tokens` */
    pi_unit_policy policy;
    int64_t staging_bytes;
    pthread_t *threads;
    int started, stop;
    pid_t process;
    pi_unit_counters counters;
    pi_unit_fault fault;
};

/* All with the lock held. */
void pi_queue_append(pi_units *s, queue *q, int64_t u);
/* 1 where the unit was in the queue. */
int pi_queue_take_out(pi_units *s, queue *q, int64_t u);
/* Starts the reader threads that do not run yet; 0, or an errno where there are none. */
int pi_readers_start(pi_units *s);
/* Memory that a reader needs for pieces of the part. */
int64_t pi_reader_bytes(const pi_unit_part *part);

#endif
