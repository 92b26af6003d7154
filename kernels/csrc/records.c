#include "records.h"

#include "arithmetic.h"
#include "bundle.h"
#include "memory.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    ABSENT,
    COMING,
    HERE,
    MOST_USE = 3,           /* rounds of the clock that a record taken often survives */
    READ_BYTES = 256 << 10, /* neighbouring records come with one read of at most so many */
};

typedef struct {
    uint8_t state, use, ahead; /* ahead: it came before it was asked for */
    uint32_t pass;             /* the last that named it */
    uint32_t taken;
} record;

typedef struct {
    pi_record_layer is;
    uint8_t *memory; /* of the first record */
    int64_t stride, count;
    record *records;
    uint8_t *page_users; /* records in memory, or on their way, that touch each page */
    int64_t begin, end;  /* of a file record, what is read of it */
    int64_t tail;        /* none of those that stay is in memory from here on */
} layer;

typedef struct {
    int64_t layer, first, count;
} job;

typedef struct {
    job *jobs;
    int64_t begin, end, room;
} job_queue;

struct pi_records {
    pthread_mutex_t lock;
    pthread_cond_t work, arrived;
    pi_disk_file *files;
    layer *layers;
    int64_t file_count, layer_count, most;
    int64_t pages, used_pages;
    int64_t coming, awaited; /* records on their way; those that a fetch waits for */
    job_queue now, ahead;
    int64_t hand_layer, hand, last; /* last: the layer that gave up one of those that stay */
    int32_t *list;
    uint8_t *marks;
    uint32_t pass;
    pthread_t *threads;
    int thread_count, started, stop;
    int cramped; /* a fetch waits for what comes, to take its room */
    pid_t process;
    int64_t staging_bytes;
    pi_record_counters counters;
    pi_unit_fault fault;
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- pages ---- */

typedef struct {
    int64_t begin, end;
} pages_of;

static pages_of pages_of_record(const layer *l, int64_t i) {
    return (pages_of){i * l->stride / PI_PAGE, ((i + 1) * l->stride - 1) / PI_PAGE + 1};
}

static int64_t new_pages(const layer *l, int64_t i) {
    const pages_of p = pages_of_record(l, i);
    int64_t count = 0;
    for (int64_t page = p.begin; page < p.end; page++) count += l->page_users[page] == 0;
    return count;
}

static void take_pages(pi_records *s, layer *l, int64_t i) {
    const pages_of p = pages_of_record(l, i);
    for (int64_t page = p.begin; page < p.end; page++) s->used_pages += l->page_users[page]++ == 0;
}

static void give_pages(pi_records *s, layer *l, int64_t i) {
    const pages_of p = pages_of_record(l, i);
    int64_t first = -1, last = -1;
    for (int64_t page = p.begin; page < p.end; page++) {
        if (--l->page_users[page]) continue;
        s->used_pages--;
        first = first < 0 ? page : first;
        last = page + 1;
        /* Neighbours keep pages at either end alone, so free ones are one run. */
    }
    if (first >= 0) madvise(l->memory + first * PI_PAGE, (size_t)((last - first) * PI_PAGE), MADV_DONTNEED);
}

/* ---- the clock ---- */

static void give_up(pi_records *s, layer *l, int64_t i) {
    l->records[i].state = ABSENT;
    l->records[i].ahead = 0;
    give_pages(s, l, i);
    s->counters.moved++;
}

static void step(pi_records *s) {
    layer *l = &s->layers[s->hand_layer];
    if (s->hand >= l->count) {
        s->hand_layer = (s->hand_layer + 1) % s->layer_count;
        s->hand = s->layers[s->hand_layer].is.fixed;
        return;
    }
    record *r = &l->records[s->hand++];
    if (r->state != HERE || r->pass == s->pass) return;
    if (r->use)
        r->use--;
    else
        give_up(s, l, s->hand - 1);
}

/* A pass that takes a whole layer may need the room of those that stay: of all layers in turn the least busy. 0 where
 * there is none. They come back as they are needed. */
static int give_up_one_that_stays(pi_records *s) {
    for (int64_t tries = 0; tries < s->layer_count; tries++) {
        s->last = (s->last + 1) % s->layer_count;
        layer *l = &s->layers[s->last];
        while (l->tail > 0 && l->records[l->tail - 1].state == ABSENT) l->tail--;
        for (int64_t i = l->tail - 1; i >= 0; i--) {
            if (l->records[i].state != HERE || l->records[i].pass == s->pass) continue;
            give_up(s, l, i);
            return 1;
        }
    }
    return 0;
}

/* Until record i fits; 0 where all others are needed. What goes may have shared a page with it. */
static int make_room(pi_records *s, const layer *l, int64_t i, int64_t most_steps, int all) {
    for (int64_t steps = 0; s->used_pages + new_pages(l, i) > s->pages; steps++) {
        if (steps <= most_steps)
            step(s);
        else if (!all || !give_up_one_that_stays(s))
            return 0;
    }
    return 1;
}

static int64_t all_steps(const pi_records *s) {
    int64_t steps = 0;
    for (int64_t k = 0; k < s->layer_count; k++) steps += s->layers[k].count + 1;
    return (MOST_USE + 2) * steps;
}

/* ---- reading ---- */

static int failed(const pi_records *s) { return s->fault.error != 0 || s->stop; }

static void append(job_queue *q, job j) {
    if (q->begin == q->end) q->begin = q->end = 0;
    q->jobs[q->end++] = j; /* room for every neuron of the longest layer twice: see has_room */
}

static int has_room(const job_queue *q) { return q->begin == q->end || q->end < q->room; }

static int64_t most_at_once(const layer *l) {
    const int64_t count = READ_BYTES / l->is.bytes;
    return count < 1 ? 1 : count;
}

/* Asks for record i; it joins the job before it where that ends there. */
static void ask_for(pi_records *s, job_queue *q, int64_t k, int64_t i) {
    layer *l = &s->layers[k];
    l->records[i].state = COMING;
    if (i < l->is.fixed && i >= l->tail) l->tail = i + 1;
    take_pages(s, l, i);
    s->coming++;
    job *last = q->end > q->begin ? &q->jobs[q->end - 1] : NULL;
    if (last && last->layer == k && last->first + last->count == i && last->count < most_at_once(l))
        last->count++;
    else
        append(q, (job){k, i, 1});
}

static int bring(const pi_records *s, const job *j, uint8_t *staging) {
    const layer *l = &s->layers[j->layer];
    const uint8_t *at = NULL;
    const int64_t offset = l->is.offset + j->first * l->is.bytes + l->begin;
    const int64_t bytes = (j->count - 1) * l->is.bytes + l->end - l->begin;
    const int error = pi_disk_read(&s->files[l->is.file], offset, bytes, staging, &at);
    if (error) return error;
    for (int64_t i = 0; i < j->count; i++, at += l->is.bytes) {
        uint8_t *out = l->memory + (j->first + i) * l->stride;
        memset(out, 0, (size_t)l->stride);
        for (int k = 0; k < PI_PARTS; k++)
            if (l->is.row_type[k] >= 0)
                pi_pack_planar(at + l->is.place[k] - l->begin, l->is.row_type[k], l->is.bundle->columns, k == PI_DOWN,
                               out + (l->is.bundle->part[k].data - l->memory));
    }
    return 0;
}

static void finish(pi_records *s, const job *j, int error) {
    layer *l = &s->layers[j->layer];
    const int64_t bytes = (j->count - 1) * l->is.bytes + l->end - l->begin;
    s->counters.read_bytes += bytes;
    if (error && !s->fault.error)
        s->fault = (pi_unit_fault){error, l->is.file, l->is.offset + j->first * l->is.bytes + l->begin, bytes};
    for (int64_t i = j->first; i < j->first + j->count; i++) {
        l->records[i].state = HERE;
        s->awaited -= l->records[i].pass == s->pass;
    }
    s->coming -= j->count;
    if (!s->awaited || s->cramped || s->fault.error) pthread_cond_signal(&s->arrived);
}

static void *reader_main(void *argument) {
    pi_records *s = argument;
    pi_memory staging;
    pi_enter_arithmetic();
    const int short_of_memory = pi_memory_map(&staging, (size_t)s->staging_bytes) < 0;
    pthread_mutex_lock(&s->lock);
    while (!s->stop) {
        job_queue *q = s->now.begin < s->now.end ? &s->now : &s->ahead;
        if (s->fault.error || q->begin == q->end) {
            pthread_cond_wait(&s->work, &s->lock);
            continue;
        }
        const job j = q->jobs[q->begin++];
        pthread_mutex_unlock(&s->lock);
        const int error = short_of_memory ? ENOMEM : bring(s, &j, staging.data);
        pthread_mutex_lock(&s->lock);
        finish(s, &j, error);
    }
    pthread_mutex_unlock(&s->lock);
    pi_memory_unmap(&staging);
    return NULL;
}

/* The threads block every signal: those belong to the program's own threads. */
static void start(pi_records *s) {
    sigset_t all, before;
    int error = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (s->started < s->thread_count && !error) {
        error = pthread_create(&s->threads[s->started], NULL, reader_main, s);
        if (!error) s->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!s->started && !s->fault.error) s->fault = (pi_unit_fault){error, 0, 0, 0};
}

/* ---- fetching ---- */

/* Notes a record that a pass names, and whether it has to come. */
static void note(pi_records *s, layer *l, int64_t i) {
    record *r = &l->records[i];
    r->pass = s->pass;
    r->taken++;
    if (r->use < MOST_USE) r->use++;
    s->counters.taken++;
    if (r->state == HERE) {
        s->counters.hits++;
        s->counters.hit_bytes += l->stride;
    }
    if (r->state == COMING) {
        s->counters.late++;
        s->awaited++;
    }
    s->counters.ahead_used += r->ahead && r->state != ABSENT;
    r->ahead = 0;
}

int pi_records_fetch(pi_records *s, int64_t k, const int32_t *list, int64_t count) {
    if (s->process != getpid()) return -1; /* a forked child has no readers */
    layer *l = &s->layers[k];
    const int64_t begun = now_ns(), most_steps = all_steps(s);
    if (!list) count = l->count;
    pthread_mutex_lock(&s->lock);
    if (s->started < s->thread_count) start(s);
    s->pass++;
    s->awaited = 0;
    for (int64_t n = 0; n < count; n++) note(s, l, list ? list[n] : n);
    for (int64_t n = 0; n < count && !failed(s); n++) {
        const int64_t i = list ? list[n] : n;
        if (l->records[i].state != ABSENT) continue;
        while (!has_room(&s->now) || !make_room(s, l, i, most_steps, 1)) {
            if (!s->coming || failed(s)) break;
            s->cramped = 1;
            pthread_cond_broadcast(&s->work);
            pthread_cond_wait(&s->arrived, &s->lock);
        }
        s->cramped = 0;
        if (s->used_pages + new_pages(l, i) > s->pages) {
            pthread_mutex_unlock(&s->lock);
            return -1;
        }
        ask_for(s, &s->now, k, i);
        s->awaited++;
    }
    if (s->awaited) pthread_cond_broadcast(&s->work);
    while (s->awaited && !failed(s)) pthread_cond_wait(&s->arrived, &s->lock);
    s->counters.wait_nanoseconds += now_ns() - begun;
    const int error = failed(s) ? -1 : 0;
    pthread_mutex_unlock(&s->lock);
    return error;
}

void pi_records_ahead(pi_records *s, int64_t k, const int32_t *list, int64_t count) {
    if (s->process != getpid()) return;
    layer *l = &s->layers[k];
    int asked = 0;
    pthread_mutex_lock(&s->lock);
    for (int64_t n = 0; n < count && !failed(s); n++) {
        record *r = &l->records[list[n]];
        if (r->state != ABSENT) {
            if (r->state == HERE && !r->use) r->use = 1; /* it is about to be taken */
            continue;
        }
        if (!has_room(&s->ahead) || !make_room(s, l, list[n], l->count, 0)) break;
        r->ahead = 1;
        r->use = 1;
        ask_for(s, &s->ahead, k, list[n]);
        s->counters.ahead++;
        asked = 1;
    }
    if (asked) pthread_cond_broadcast(&s->work);
    pthread_mutex_unlock(&s->lock);
}

/* ---- looking ---- */

int64_t pi_records_memory(const pi_records *s) { return s->pages * PI_PAGE + s->staging_bytes * s->thread_count; }
int64_t pi_records_layers(const pi_records *s) { return s->layer_count; }
int64_t pi_records_neurons(const pi_records *s, int64_t k) { return s->layers[k].count; }
int32_t *pi_records_list(pi_records *s) { return s->list; }
uint8_t *pi_records_marks(pi_records *s) { return s->marks; }

void pi_records_taken(pi_records *s, int64_t k, int64_t *taken) {
    pthread_mutex_lock(&s->lock);
    for (int64_t i = 0; i < s->layers[k].count; i++) taken[i] = s->layers[k].records[i].taken;
    pthread_mutex_unlock(&s->lock);
}

void pi_records_reset(pi_records *s) {
    pthread_mutex_lock(&s->lock);
    s->counters = (pi_record_counters){0};
    for (int64_t k = 0; k < s->layer_count; k++)
        for (int64_t i = 0; i < s->layers[k].count; i++) s->layers[k].records[i].taken = 0;
    pthread_mutex_unlock(&s->lock);
}

pi_record_counters pi_records_counters(pi_records *s) {
    pthread_mutex_lock(&s->lock);
    const pi_record_counters counters = s->counters;
    pthread_mutex_unlock(&s->lock);
    return counters;
}

pi_unit_fault pi_records_fault(pi_records *s) {
    pthread_mutex_lock(&s->lock);
    const pi_unit_fault fault = s->fault;
    pthread_mutex_unlock(&s->lock);
    return fault;
}

/* ---- making and ending ---- */

static int64_t stride_of(const pi_bundle *b) {
    for (int k = 0; k < PI_PARTS; k++)
        if (b->part[k].data) return b->part[k].stride;
    return 0;
}

static uint8_t *memory_of(const pi_bundle *b) {
    for (int k = 0; k < PI_PARTS; k++)
        if (b->part[k].data) return (uint8_t *)b->part[k].data; /* parts lie in the order of their numbers */
    return NULL;
}

static int make_layer(layer *l, const pi_record_layer *is) {
    *l = (layer){.is = *is,
                 .memory = memory_of(is->bundle),
                 .stride = stride_of(is->bundle),
                 .count = is->bundle->rows,
                 .begin = is->bytes};
    for (int k = 0; k < PI_PARTS; k++) {
        if (is->row_type[k] < 0) continue;
        const int64_t end = is->place[k] + pi_row_bytes(is->row_type[k], is->bundle->columns);
        l->begin = is->place[k] < l->begin ? is->place[k] : l->begin;
        l->end = end > l->end ? end : l->end;
    }
    l->records = calloc((size_t)l->count + 1, sizeof *l->records);
    l->page_users = calloc((size_t)(l->count * l->stride / PI_PAGE) + 2, 1);
    return l->records && l->page_users ? 0 : -1;
}

static int make_queue(job_queue *q, int64_t room) {
    q->jobs = calloc((size_t)room + 1, sizeof *q->jobs);
    q->room = room;
    return q->jobs ? 0 : -1;
}

static int make(pi_records *s, const int *descriptors, const int *direct, const pi_record_layer *layers) {
    s->files = calloc((size_t)s->file_count + 1, sizeof *s->files);
    s->layers = calloc((size_t)s->layer_count + 1, sizeof *s->layers);
    s->threads = calloc((size_t)s->thread_count + 1, sizeof *s->threads);
    if (!s->files || !s->layers || !s->threads) return -1;
    for (int64_t i = 0; i < s->file_count; i++)
        if (pi_disk_file_note(&s->files[i], descriptors[i], direct[i]) < 0) return -1;
    for (int64_t k = 0; k < s->layer_count; k++) {
        layer *l = &s->layers[k];
        if (make_layer(l, &layers[k]) < 0) return -1;
        const int64_t bytes = (most_at_once(l) + 1) * l->is.bytes + 2 * PI_PAGE;
        s->staging_bytes = bytes > s->staging_bytes ? bytes : s->staging_bytes;
        s->most = l->count > s->most ? l->count : s->most;
    }
    s->list = calloc((size_t)s->most + 16, sizeof *s->list);
    s->marks = calloc((size_t)s->most + 16, 1);
    if (!s->list || !s->marks) return -1;
    return make_queue(&s->now, s->most) < 0 || make_queue(&s->ahead, s->most) < 0 ? -1 : 0;
}

static void release(pi_records *s) {
    for (int64_t k = 0; s->layers && k < s->layer_count; k++) {
        free(s->layers[k].records);
        free(s->layers[k].page_users);
    }
    free(s->files);
    free(s->layers);
    free(s->threads);
    free(s->list);
    free(s->marks);
    free(s->now.jobs);
    free(s->ahead.jobs);
    pthread_cond_destroy(&s->work);
    pthread_cond_destroy(&s->arrived);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

pi_records *pi_records_new(const int *descriptors, const int *direct, int files, const pi_record_layer *layers,
                           int64_t layer_count, int64_t pages, int threads) {
    pi_records *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->file_count = files;
    s->layer_count = layer_count;
    s->pages = pages;
    s->thread_count = threads;
    s->process = getpid();
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    pthread_cond_init(&s->arrived, NULL);
    errno = 0;
    if (make(s, descriptors, direct, layers) < 0) {
        const int error = errno ? errno : ENOMEM;
        release(s);
        errno = error;
        return NULL;
    }
    s->hand = s->layers[0].is.fixed;
    return s;
}

void pi_records_free(pi_records *s) {
    if (!s) return;
    if (s->process == getpid()) {
        pthread_mutex_lock(&s->lock);
        s->stop = 1;
        pthread_cond_broadcast(&s->work);
        pthread_mutex_unlock(&s->lock);
        for (int i = 0; i < s->started; i++) pthread_join(s->threads[i], NULL);
    }
    for (int64_t k = 0; k < s->layer_count; k++)
        madvise(s->layers[k].memory, (size_t)(s->layers[k].count * s->layers[k].stride), MADV_DONTNEED);
    for (int64_t i = 0; i < s->file_count; i++) close(s->files[i].descriptor);
    release(s);
}
