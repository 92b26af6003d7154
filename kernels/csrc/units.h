/* Weights that stay on disk, unit by unit, and slots of memory that hold the units in use.
 *
 * A unit is what is read and kept as a whole: an expert, or the matrices of a layer. Threads of the cache's own read
 * it piece by piece, past the page cache where the file system allows that, and pack each piece on arrival. A program
 * asks for units with an operation, which waits for those that its tokens take, and lets those be read ahead that they
 * may take next. What is read ahead in vain costs bandwidth; results depend on none of this. */
#ifndef PI_UNITS_H
#define PI_UNITS_H

#include "disk_read.h"
#include "kernels.h"
#include "memory.h"

typedef struct pi_units pi_units;

typedef struct {         /* a matrix of a unit: packed into the unit's slot, from rows of a file */
    pi_matrix *matrix;   /* its `data` is NULL while the unit is not in use */
    int32_t row_type;    /* of the file's rows */
    int32_t file;        /* index */
    int64_t offset;      /* of the first row */
    int64_t place;       /* of the tiles in the slot */
    int64_t piece_tiles; /* tiles that one read brings */
} pi_unit_part;

typedef struct {
    int32_t kind; /* which slots it fits in */
    int64_t first_part, parts;
} pi_unit_spec;

typedef struct { /* slots of one size */
    int64_t count, bytes;
} pi_slot_kind_spec;

typedef struct {
    int64_t taken;            /* units that tokens of a pass took, added up over passes */
    int64_t hits;             /* those of them that were in memory */
    int64_t late;             /* those that were being read already */
    int64_t ahead;            /* units asked for ahead of need */
    int64_t ahead_used;       /* those of them that were then taken while they were there or on their way */
    int64_t read_bytes;       /* from the files */
    int64_t hit_bytes;        /* of the hits, packed */
    int64_t moved;            /* units that gave up their slot */
    int64_t wait_nanoseconds; /* that programs waited */
} pi_unit_counters;

/* How slots change hands: the unit taken longest ago goes, or the one with the least use, where a use counts half after
 * `half_life` tokens (0: the unit taken longest ago). */
typedef struct {
    int threads;
    double half_life;
} pi_unit_policy;

/* Takes over nothing on failure: NULL with errno set. `descriptors` are closed with the cache. */
pi_units *pi_units_new(const int *descriptors, const int *direct, int files, const pi_slot_kind_spec *kinds,
                       int kind_count, const pi_unit_spec *units, int64_t unit_count, const pi_unit_part *parts,
                       pi_unit_policy policy);
/* Ends the threads and gives the memory back; no program may use the units any more. */
void pi_units_free(pi_units *units);

typedef struct {           /* what a pass takes of a group of units, which are [first, first + count) */
    const int32_t *chosen; /* [tokens, used] numbers within the group; NULL: every token takes all */
    int64_t first, count, used;
} pi_unit_demand;

enum { PI_UNITS_AHEAD = 2 /* later groups that a fetch asks for */ };

/* Waits until the units of `now` are in memory, and asks for those of `next`, soonest first (count 0: none). 0, or -1
 * after a fault, or where slots are too few. */
int pi_units_fetch(pi_units *units, const pi_unit_demand *now, const pi_unit_demand next[PI_UNITS_AHEAD],
                   int64_t tokens);
/* Reads `units` into free slots and waits for them; with `fixed` they keep their slots. Stops where no slot is left.
 * Returns how many are there, or -1 after a fault. */
int64_t pi_units_load(pi_units *units, const int32_t *list, int64_t count, int fixed);
/* The use that each unit is taken to have had. */
void pi_units_set_use(pi_units *units, const double *use);
/* Tokens that took each unit so far. */
void pi_units_taken(pi_units *units, int64_t *taken);
pi_unit_counters pi_units_counters(pi_units *units);
pi_unit_fault pi_units_fault(pi_units *units);
int64_t pi_units_count(const pi_units *units);
/* Memory of slots and of the threads' buffers. */
int64_t pi_units_memory(const pi_units *units);

#endif
