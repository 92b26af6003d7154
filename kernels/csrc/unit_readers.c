/* Queues of units to read, and the threads that read them piece by piece and pack each piece into its slot. */
#include "unit_readers.h"

#include "arithmetic.h"

#include <errno.h>
#include <signal.h>

/* ---- queues ---- */

void pi_queue_append(pi_units *s, queue *q, int64_t u) {
    s->units[u].next = -1;
    if (q->first < 0)
        q->first = u;
    else
        s->units[q->last].next = u;
    q->last = u;
}

int pi_queue_take_out(pi_units *s, queue *q, int64_t u) {
    for (int64_t before = -1, at = q->first; at >= 0; before = at, at = s->units[at].next) {
        if (at != u) continue;
        if (before < 0)
            q->first = s->units[u].next;
        else
            s->units[before].next = s->units[u].next;
        if (q->last == u) q->last = before;
        return 1;
    }
    return 0;
}

/* ---- readers ---- */

typedef struct {
    int64_t unit, part, tile, tiles;
    int64_t offset, bytes;
    uint8_t *out;
} piece;

/* The next piece of the first unit that has one; 0 where there is none. */
static int next_piece(pi_units *s, piece *p) {
    queue *q = s->now.first >= 0 ? &s->now : &s->ahead;
    if (q->first < 0) return 0;
    unit *u = &s->units[q->first];
    const pi_unit_part *part = &s->parts[u->is.first_part + u->part];
    const pi_matrix *m = part->matrix;
    const slot_kind *kind = &s->kinds[u->is.kind];
    const int64_t row = pi_row_bytes(part->row_type, m->columns), left = m->tiles - u->tile;
    p->unit = q->first;
    p->part = u->is.first_part + u->part;
    p->tile = u->tile;
    p->tiles = left < part->piece_tiles ? left : part->piece_tiles;
    const int64_t rows = m->rows - p->tile * PI_TILE;
    p->offset = part->offset + p->tile * PI_TILE * row;
    p->bytes = (rows < p->tiles * PI_TILE ? rows : p->tiles * PI_TILE) * row;
    p->out = (uint8_t *)kind->memory.data + u->slot * kind->is.bytes + part->place + p->tile * m->tile_bytes;
    u->tile += p->tiles;
    if (u->tile == m->tiles) {
        u->tile = 0;
        u->part++;
    }
    if (u->part == u->is.parts) pi_queue_take_out(s, q, q->first);
    return 1;
}

static int bring(pi_units *s, const piece *p, uint8_t *staging) {
    const pi_unit_part *part = &s->parts[p->part];
    const pi_matrix *m = part->matrix;
    const uint8_t *rows = NULL;
    const int failed = pi_disk_read(&s->files[part->file], p->offset, p->bytes, staging, &rows);
    if (failed) return failed;
    const int64_t left = m->rows - p->tile * PI_TILE, all = p->tiles * PI_TILE;
    pi_pack_tiles(rows, part->row_type, left < all ? left : all, m->columns, 0, p->tiles, p->out);
    return 0;
}

static void finish(pi_units *s, const piece *p, int failed) {
    unit *u = &s->units[p->unit];
    s->counters.read_bytes += p->bytes;
    if (failed && !s->fault.error) s->fault = (pi_unit_fault){failed, s->parts[p->part].file, p->offset, p->bytes};
    if (--u->left == 0 && u->state == COMING) u->state = HERE;
    if (u->left == 0 || s->fault.error) pthread_cond_broadcast(&s->arrived);
}

static void *reader_main(void *argument) {
    pi_units *s = argument;
    pi_memory staging;
    pi_enter_arithmetic();
    const int short_of_memory = pi_memory_map(&staging, (size_t)s->staging_bytes) < 0;
    pthread_mutex_lock(&s->lock);
    while (!s->stop) {
        piece p;
        if (s->fault.error || !next_piece(s, &p)) {
            pthread_cond_wait(&s->work, &s->lock);
            continue;
        }
        /* One is woken for a unit, and wakes the next where there is more to do. */
        if (s->now.first >= 0 || s->ahead.first >= 0) pthread_cond_signal(&s->work);
        pthread_mutex_unlock(&s->lock);
        const int failed = short_of_memory ? ENOMEM : bring(s, &p, staging.data);
        pthread_mutex_lock(&s->lock);
        finish(s, &p, failed);
    }
    pthread_mutex_unlock(&s->lock);
    pi_memory_unmap(&staging);
    return NULL;
}

/* The threads block every signal: those belong to the program's own threads. */
int pi_readers_start(pi_units *s) {
    sigset_t all, before;
    int error = 0;
    if (s->started == s->policy.threads) return 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (s->started < s->policy.threads && !error) {
        error = pthread_create(&s->threads[s->started], NULL, reader_main, s);
        if (!error) s->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return s->started ? 0 : error;
}

int64_t pi_reader_bytes(const pi_unit_part *part) {
    return part->piece_tiles * PI_TILE * pi_row_bytes(part->row_type, part->matrix->columns) + 2 * PI_PAGE;
}
