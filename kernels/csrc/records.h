/* Records of neurons that stay on disk: those in use are in memory, each in its place of its layer's bundle.
 *
 * A bundle (bundle.h) that was made without rows has addresses for all of its records and memory for none. A program
 * names neurons with an operation, which waits until their records are read and packed in place, so that the sparse
 * operations after it work as on any bundle; what they do not name they do not touch. Pages of records that make room
 * are given back to the system. The first records of a layer, its busiest, stay as long as what a pass takes fits beside
 * them; of the others those go that were not taken for longest, where each use counts for some rounds (a clock with
 * counters). Results depend on none of
 * this. */
#ifndef PI_RECORDS_H
#define PI_RECORDS_H

#include "disk_read.h"
#include "kernels.h"
#include "pool.h"

typedef struct pi_records pi_records;

typedef struct { /* the records of one layer, one after the other in a file */
    const pi_bundle *bundle;
    int32_t file;
    int64_t offset, bytes;      /* of record 0 in the file; of one record there */
    int64_t place[PI_PARTS];    /* of each part's row in the record */
    int32_t row_type[PI_PARTS]; /* in the file; -1: not read */
    int64_t fixed;              /* how many stay */
} pi_record_layer;

typedef struct {
    int64_t taken, hits, late; /* records that passes named; those that were in memory, and on their way */
    int64_t ahead, ahead_used; /* asked for ahead of need; taken then */
    int64_t read_bytes, hit_bytes;
    int64_t moved; /* records that made room */
    int64_t wait_nanoseconds;
} pi_record_counters;

/* `pages` of memory for records, and `reading_bytes` for what is being read. Takes over nothing on failure: NULL with
 * errno set (EINVAL: too little for the largest read). `descriptors` are closed with it. */
pi_records *pi_records_new(const int *descriptors, const int *direct, int files, const pi_record_layer *layers,
                           int64_t layer_count, int64_t pages, int64_t reading_bytes);
/* Gives all pages back and closes the files; no program may use the records any more. */
void pi_records_free(pi_records *records);

int64_t pi_records_layers(const pi_records *records);
int64_t pi_records_neurons(const pi_records *records, int64_t layer);
/* Whether the system reads while nobody waits. */
int pi_records_asynchronous(const pi_records *records);
/* Memory of the pages and of what is being read. */
int64_t pi_records_memory(const pi_records *records);
/* Room for a list of the neurons of any layer, and for marks of them, which one caller at a time may use. */
int32_t *pi_records_list(pi_records *records);
uint8_t *pi_records_marks(pi_records *records);
/* Waits until the listed neurons of a layer, ascending, are in memory; NULL: all. All workers of a pool call it, and lay
 * out what arrives; the list is the first one's. 0, or -1 after a fault, or where there is too little memory. */
int pi_records_fetch(pi_records *records, pi_worker *worker, int64_t layer, const int32_t *list, int64_t count);
/* Asks for the listed ones to be read, as far as there is room without those of the last fetch. `certain`: a fetch is
 * going to name them. */
void pi_records_ahead(pi_records *records, int64_t layer, const int32_t *list, int64_t count, int certain);
/* How often each neuron of a layer was taken. */
void pi_records_taken(pi_records *records, int64_t layer, int64_t *taken);
/* Counts from here on. */
void pi_records_reset(pi_records *records);
pi_record_counters pi_records_counters(pi_records *records);
pi_unit_fault pi_records_fault(pi_records *records);

#endif
