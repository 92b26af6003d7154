#include "unit_readers.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { READ_AHEAD = 64 << 10 /* as in module.h */ };

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- slots ---- */

static void place_matrices(pi_units *s, const unit *u) {
    const slot_kind *kind = &s->kinds[u->is.kind];
    uint8_t *slot = u->state == HERE ? (uint8_t *)kind->memory.data + u->slot * kind->is.bytes : NULL;
    for (int64_t i = u->is.first_part; i < u->is.first_part + u->is.parts; i++)
        s->parts[i].matrix->data = slot ? slot + s->parts[i].place : NULL;
}

static void give_up(pi_units *s, unit *u) {
    slot_kind *kind = &s->kinds[u->is.kind];
    u->state = ABSENT;
    u->was_ahead = 0;
    place_matrices(s, u);
    kind->holder[u->slot] = -1;
    kind->free[kind->free_count++] = u->slot;
    u->slot = -1;
}

/* Frees the slot of the unit of least use; 0 where all are kept. With `spare`, of those that are not expected. */
static int evict(pi_units *s, int32_t k, int spare) {
    slot_kind *kind = &s->kinds[k];
    unit *least = NULL;
    for (int64_t i = 0; i < kind->is.count; i++) {
        if (kind->holder[i] < 0) continue;
        unit *u = &s->units[kind->holder[i]];
        if (u->state != HERE || u->fixed || u->pinned || (spare && u->expected)) continue;
        if (!least || u->use < least->use) least = u;
    }
    if (!least) return 0;
    give_up(s, least);
    s->counters.moved++;
    return 1;
}

/* Takes back what was asked for ahead and is not begun, of units of that kind. */
static int cancel_ahead(pi_units *s, int32_t k) {
    for (int64_t at = s->ahead.first; at >= 0; at = s->units[at].next) {
        unit *u = &s->units[at];
        if (u->is.kind != k || u->part || u->tile) continue;
        pi_queue_take_out(s, &s->ahead, at);
        u->expected = 0;
        give_up(s, u);
        return 1;
    }
    return 0;
}

static int64_t pieces_of(const pi_units *s, const unit *u) {
    int64_t pieces = 0;
    for (int64_t i = u->is.first_part; i < u->is.first_part + u->is.parts; i++)
        pieces += (s->parts[i].matrix->tiles + s->parts[i].piece_tiles - 1) / s->parts[i].piece_tiles;
    return pieces;
}

static void ask_for(pi_units *s, int64_t at, queue *q) {
    unit *u = &s->units[at];
    slot_kind *kind = &s->kinds[u->is.kind];
    u->slot = kind->free[--kind->free_count];
    kind->holder[u->slot] = at;
    u->state = COMING;
    u->part = 0;
    u->tile = 0;
    u->left = (int32_t)pieces_of(s, u);
    pi_queue_append(s, q, at);
    pthread_cond_signal(&s->work);
}

/* ---- fetching ---- */

/* How much a use counts now: what was used long ago counts less than it did. */
static double worth(pi_units *s) {
    if (s->policy.half_life <= 0.0) return 1.0;
    const double power = s->tokens / s->policy.half_life;
    if (power < 512.0) return exp2(power);
    const double shrink = exp2(-power);
    for (int64_t i = 0; i < s->count; i++) s->units[i].use *= shrink;
    s->tokens = 0.0;
    return 1.0;
}

static void note_use(pi_units *s, unit *u, int64_t tokens, double one) {
    u->taken += tokens;
    if (s->policy.half_life > 0.0)
        u->use += (double)tokens * one;
    else
        u->use = (double)s->pass;
}

/* Units that the demand names, ascending, each once: marks them with the pass, and counts their tokens. */
static void mark(pi_units *s, const pi_unit_demand *d, int64_t tokens) {
    s->pass++;
    if (!d->chosen)
        for (int64_t i = 0; i < d->count; i++) {
            s->units[d->first + i].mark = s->pass;
            s->units[d->first + i].count = tokens;
        }
    else
        for (int64_t i = 0; i < tokens * d->used; i++) {
            const int32_t chosen = d->chosen[i];            /* read once: another thread may change it */
            if (chosen < 0 || chosen >= d->count) continue; /* what computes with it says so */
            unit *u = &s->units[d->first + chosen];
            u->count = u->mark == s->pass ? u->count + 1 : 1;
            u->mark = s->pass;
        }
}

static void unpin(pi_units *s) {
    for (int64_t i = 0; i < s->pinned_count; i++) s->units[s->pinned[i]].pinned = 0;
    s->pinned_count = 0;
}

/* Pins what the pass takes, counts it, and moves what is being read ahead to the front. */
static void pin_taken(pi_units *s, const pi_unit_demand *d) {
    const double one = worth(s);
    for (int64_t at = d->first; at < d->first + d->count; at++) {
        unit *u = &s->units[at];
        const int taken = u->mark == s->pass;
        if (!taken && u->expected && u->state == COMING && !u->part && !u->tile && pi_queue_take_out(s, &s->ahead, at))
            give_up(s, u);
        u->expected = 0;
        if (!taken) continue;
        u->pinned = 1;
        s->pinned[s->pinned_count++] = at;
        note_use(s, u, u->count, one);
        s->counters.taken++;
        if (u->was_ahead && u->state != ABSENT) s->counters.ahead_used++;
        u->was_ahead = 0;
        if (u->state == HERE) {
            s->counters.hits++;
            for (int64_t i = u->is.first_part; i < u->is.first_part + u->is.parts; i++)
                s->counters.hit_bytes += s->parts[i].matrix->tiles * s->parts[i].matrix->tile_bytes;
        }
        if (u->state == COMING) {
            s->counters.late++;
            if (pi_queue_take_out(s, &s->ahead, at)) pi_queue_append(s, &s->now, at);
        }
    }
}

static int failed(const pi_units *s) { return s->fault.error != 0 || s->stop; }

/* Asks for what the pass takes and is not there; waits for slots where they are held by reads in progress. */
static int ask_for_taken(pi_units *s, const pi_unit_demand *d) {
    for (int64_t at = d->first; at < d->first + d->count; at++) {
        unit *u = &s->units[at];
        const int32_t k = u->is.kind;
        if (u->mark != s->pass || u->state != ABSENT) continue;
        while (!s->kinds[k].free_count && !evict(s, k, 1) && !cancel_ahead(s, k) && !evict(s, k, 0)) {
            int64_t coming = 0;
            for (int64_t i = 0; i < s->kinds[k].is.count; i++) {
                const int64_t held = s->kinds[k].holder[i];
                coming += held >= 0 && s->units[held].state == COMING && !s->units[held].pinned;
            }
            if (failed(s) || !coming) return -1;
            pthread_cond_wait(&s->arrived, &s->lock);
        }
        ask_for(s, at, &s->now);
    }
    return 0;
}

static void ask_ahead(pi_units *s, const pi_unit_demand *d, int64_t tokens) {
    mark(s, d, tokens);
    for (int64_t at = d->first; at < d->first + d->count; at++) {
        unit *u = &s->units[at];
        if (u->mark != s->pass) continue;
        if (u->state == ABSENT) {
            if (!s->kinds[u->is.kind].free_count && !evict(s, u->is.kind, 1)) continue;
            ask_for(s, at, &s->ahead);
            u->was_ahead = 1;
            s->counters.ahead++;
        }
        u->expected = 1;
    }
}

static int wait_for_taken(pi_units *s, int64_t pinned) {
    const int64_t begun = now_ns();
    for (int64_t i = 0; i < pinned && !failed(s);) {
        if (s->units[s->pinned[i]].state == HERE)
            i++;
        else
            pthread_cond_wait(&s->arrived, &s->lock);
    }
    s->counters.wait_nanoseconds += now_ns() - begun;
    if (failed(s)) return -1;
    for (int64_t i = 0; i < pinned; i++) place_matrices(s, &s->units[s->pinned[i]]);
    return 0;
}

int pi_units_fetch(pi_units *s, const pi_unit_demand *now, const pi_unit_demand next[PI_UNITS_AHEAD], int64_t tokens) {
    int error = s->process == getpid() ? 0 : -1; /* a forked child has no readers */
    if (error) return error;
    pthread_mutex_lock(&s->lock);
    if (pi_readers_start(s) && !s->fault.error) s->fault = (pi_unit_fault){EAGAIN, 0, 0, 0};
    unpin(s);
    if (s->first_group < 0) s->first_group = now->first;
    if (now->first == s->first_group) s->tokens += (double)tokens;
    mark(s, now, tokens);
    pin_taken(s, now);
    error = ask_for_taken(s, now);
    for (int k = 0; k < PI_UNITS_AHEAD && !error; k++)
        if (next[k].count) ask_ahead(s, &next[k], tokens);
    if (!error) error = wait_for_taken(s, s->pinned_count);
    pthread_mutex_unlock(&s->lock);
    return error;
}

int64_t pi_units_load(pi_units *s, const int32_t *list, int64_t count, int fixed) {
    int64_t done = 0;
    pthread_mutex_lock(&s->lock);
    if (pi_readers_start(s) && !s->fault.error) s->fault = (pi_unit_fault){EAGAIN, 0, 0, 0};
    for (; done < count; done++) {
        unit *u = &s->units[list[done]];
        if (u->state == ABSENT) {
            if (!s->kinds[u->is.kind].free_count) break;
            ask_for(s, list[done], &s->now);
        }
        u->fixed |= fixed;
    }
    for (int64_t i = 0; i < done && !failed(s);) {
        if (s->units[list[i]].state == HERE)
            i++;
        else
            pthread_cond_wait(&s->arrived, &s->lock);
    }
    if (failed(s)) done = -1;
    pthread_mutex_unlock(&s->lock);
    return done;
}

void pi_units_set_use(pi_units *s, const double *use) {
    pthread_mutex_lock(&s->lock);
    for (int64_t i = 0; i < s->count; i++) s->units[i].use = use[i];
    pthread_mutex_unlock(&s->lock);
}

void pi_units_taken(pi_units *s, int64_t *taken) {
    pthread_mutex_lock(&s->lock);
    for (int64_t i = 0; i < s->count; i++) taken[i] = s->units[i].taken;
    pthread_mutex_unlock(&s->lock);
}

pi_unit_counters pi_units_counters(pi_units *s) {
    pthread_mutex_lock(&s->lock);
    const pi_unit_counters counters = s->counters;
    pthread_mutex_unlock(&s->lock);
    return counters;
}

pi_unit_fault pi_units_fault(pi_units *s) {
    pthread_mutex_lock(&s->lock);
    const pi_unit_fault fault = s->fault;
    pthread_mutex_unlock(&s->lock);
    return fault;
}

int64_t pi_units_count(const pi_units *s) { return s->count; }

int64_t pi_units_memory(const pi_units *s) {
    int64_t bytes = s->staging_bytes * s->policy.threads;
    for (int k = 0; k < s->kind_count; k++) bytes += s->kinds[k].is.count * s->kinds[k].is.bytes;
    return bytes;
}

/* ---- making and ending ---- */

static int make_kind(slot_kind *kind, pi_slot_kind_spec is) {
    kind->is = is;
    kind->free = calloc((size_t)is.count + 1, sizeof *kind->free);
    kind->holder = calloc((size_t)is.count + 1, sizeof *kind->holder);
    if (!kind->free || !kind->holder) return -1;
    if (pi_memory_map(&kind->memory, (size_t)(is.count * is.bytes) + READ_AHEAD) < 0) return -1;
    for (int64_t i = 0; i < is.count; i++) {
        kind->free[kind->free_count++] = (int32_t)(is.count - 1 - i);
        kind->holder[i] = -1;
    }
    return 0;
}

static int make(pi_units *s, const int *descriptors, const int *direct, const pi_slot_kind_spec *kinds,
                const pi_unit_spec *units, const pi_unit_part *parts) {
    int64_t part_count = 0;
    for (int64_t i = 0; i < s->count; i++) part_count += units[i].parts;
    s->files = calloc((size_t)s->file_count + 1, sizeof *s->files);
    s->kinds = calloc((size_t)s->kind_count + 1, sizeof *s->kinds);
    s->units = calloc((size_t)s->count + 1, sizeof *s->units);
    s->pinned = calloc((size_t)s->count + 1, sizeof *s->pinned);
    s->parts = calloc((size_t)part_count + 1, sizeof *s->parts);
    s->threads = calloc((size_t)s->policy.threads + 1, sizeof *s->threads);
    if (!s->files || !s->kinds || !s->units || !s->pinned || !s->parts || !s->threads) return -1;
    for (int i = 0; i < s->file_count; i++)
        if (pi_disk_file_note(&s->files[i], descriptors[i], direct[i]) < 0) return -1;
    for (int k = 0; k < s->kind_count; k++)
        if (make_kind(&s->kinds[k], kinds[k]) < 0) return -1;
    for (int64_t i = 0; i < s->count; i++) s->units[i] = (unit){.is = units[i], .slot = -1, .next = -1};
    for (int64_t i = 0; i < part_count; i++) {
        s->parts[i] = parts[i];
        const int64_t bytes = pi_reader_bytes(&parts[i]);
        if (bytes > s->staging_bytes) s->staging_bytes = bytes;
    }
    return 0;
}

static void release(pi_units *s) {
    for (int k = 0; s->kinds && k < s->kind_count; k++) {
        pi_memory_unmap(&s->kinds[k].memory);
        free(s->kinds[k].free);
        free(s->kinds[k].holder);
    }
    free(s->files);
    free(s->kinds);
    free(s->units);
    free(s->pinned);
    free(s->parts);
    free(s->threads);
    pthread_cond_destroy(&s->work);
    pthread_cond_destroy(&s->arrived);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

pi_units *pi_units_new(const int *descriptors, const int *direct, int files, const pi_slot_kind_spec *kinds,
                       int kind_count, const pi_unit_spec *units, int64_t unit_count, const pi_unit_part *parts,
                       pi_unit_policy policy) {
    pi_units *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->file_count = files;
    s->kind_count = kind_count;
    s->count = unit_count;
    s->policy = policy;
    s->now = s->ahead = (queue){-1, -1};
    s->first_group = -1;
    s->process = getpid();
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    pthread_cond_init(&s->arrived, NULL);
    if (make(s, descriptors, direct, kinds, units, parts) < 0) {
        const int error = errno ? errno : ENOMEM;
        release(s);
        errno = error;
        return NULL;
    }
    return s;
}

void pi_units_free(pi_units *s) {
    if (!s) return;
    if (s->process == getpid()) {
        pthread_mutex_lock(&s->lock);
        s->stop = 1;
        pthread_cond_broadcast(&s->work);
        pthread_mutex_unlock(&s->lock);
        for (int i = 0; i < s->started; i++) pthread_join(s->threads[i], NULL);
    }
    for (int64_t i = 0; i < s->count; i++)
        for (int64_t p = 0; p < s->units[i].is.parts; p++) s->parts[s->units[i].is.first_part + p].matrix->data = NULL;
    for (int i = 0; i < s->file_count; i++) close(s->files[i].descriptor);
    release(s);
}
