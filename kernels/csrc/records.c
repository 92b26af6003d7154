#include "records.h"

#include "bundle.h"
#include "disk_queue.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
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
    uint64_t *moving;    /* a bit for each of them that does not stay */
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
    pi_disk_file *files;
    layer *layers;
    int64_t file_count, layer_count, most;
    int64_t pages, used_pages;
    int64_t coming;          /* records on their way */
    _Atomic int64_t awaited; /* those of them that a fetch waits for */
    _Atomic int broken;      /* there was a fault */
    job_queue now, ahead;    /* not begun */
    pi_disk_queue *reads;
    job under_way[PI_DISK_DEPTH];
    int64_t hand, last; /* layers; last: the layer that gave up one of those that stay */
    int32_t *list;
    uint8_t *marks;
    uint32_t pass;
    int named; /* by the last fetch: whether there is room for them */
    int64_t begun;
    pid_t process;
    int64_t reading_bytes;
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

/* Pages without users, one run of them, which may have gaps that nobody uses either. */
static void give_back(const layer *l, pages_of run) {
    if (run.end > run.begin)
        madvise(l->memory + run.begin * PI_PAGE, (size_t)(run.end - run.begin) * PI_PAGE, MADV_DONTNEED);
}

static void give_pages(pi_records *s, layer *l, int64_t i) {
    const pages_of p = pages_of_record(l, i);
    pages_of run = {0, 0};
    for (int64_t page = p.begin; page < p.end; page++) {
        if (--l->page_users[page]) continue;
        s->used_pages--;
        if (run.begin == run.end) run.begin = page;
        run.end = page + 1; /* neighbours keep pages at either end alone, so free ones are one run */
    }
    give_back(l, run);
}

/* ---- the clock ---- */

static void give_up(pi_records *s, layer *l, int64_t i) {
    l->records[i].state = ABSENT;
    l->records[i].ahead = 0;
    give_pages(s, l, i);
    s->counters.moved++;
}

/* The first record from i on that does not stay, and is in memory or on its way; `count` where there is none. */
static int64_t next_moving(const layer *l, int64_t i) {
    for (; i < l->count; i = i / 64 * 64 + 64) {
        const uint64_t word = l->moving[i / 64] >> i % 64;
        if (word) return i + __builtin_ctzll(word);
    }
    return l->count;
}

/* The hand passes over a whole layer: giving back pages by runs costs a tenth of giving back those of each record. */
static void step(pi_records *s) {
    layer *l = &s->layers[s->hand];
    pages_of run = {0, 0};
    s->hand = (s->hand + 1) % s->layer_count;
    for (int64_t i = next_moving(l, l->is.fixed); i < l->count; i = next_moving(l, i + 1)) {
        record *r = &l->records[i];
        const int old = r->state == HERE && r->pass != s->pass;
        if (!old || r->use) {
            if (old) r->use--;
            give_back(l, run);
            run = (pages_of){0, 0};
            continue;
        }
        r->state = ABSENT;
        r->ahead = 0;
        l->moving[i / 64] &= ~(1ull << i % 64);
        s->counters.moved++;
        const pages_of p = pages_of_record(l, i);
        for (int64_t page = p.begin; page < p.end; page++) {
            if (--l->page_users[page]) continue;
            s->used_pages--;
            if (run.begin == run.end) run.begin = page;
            run.end = page + 1;
        }
    }
    give_back(l, run);
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

static int64_t all_steps(const pi_records *s) { return (MOST_USE + 2) * s->layer_count; }

/* ---- reading ---- */

static int failed(pi_records *s) { return atomic_load_explicit(&s->broken, memory_order_relaxed); }

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
    if (i >= l->is.fixed) l->moving[i / 64] |= 1ull << i % 64;
    if (i < l->is.fixed && i >= l->tail) l->tail = i + 1;
    take_pages(s, l, i);
    s->coming++;
    job *last = q->end > q->begin ? &q->jobs[q->end - 1] : NULL;
    if (last && last->layer == k && last->first + last->count == i && last->count < most_at_once(l))
        last->count++;
    else
        append(q, (job){k, i, 1});
}

static int64_t read_bytes(const layer *l, const job *j) { return (j->count - 1) * l->is.bytes + l->end - l->begin; }
static int64_t read_offset(const layer *l, const job *j) { return l->is.offset + j->first * l->is.bytes + l->begin; }

/* Begins as many reads as there is room for. */
static void pump(pi_records *s) {
    for (;;) {
        job_queue *q = s->now.begin < s->now.end ? &s->now : &s->ahead;
        if (failed(s) || q->begin == q->end) break;
        const job *j = &q->jobs[q->begin];
        const layer *l = &s->layers[j->layer];
        const pi_disk_file *file = &s->files[l->is.file];
        const int64_t slot = pi_disk_queue_add(s->reads, file, read_offset(l, j), read_bytes(l, j));
        if (slot < 0) break;
        s->under_way[slot] = *j;
        q->begin++;
    }
    pi_disk_queue_start(s->reads);
}

static void lay_out(const layer *l, const job *j, const uint8_t *at) {
    for (int64_t i = 0; i < j->count; i++, at += l->is.bytes) {
        uint8_t *out = l->memory + (j->first + i) * l->stride;
        memset(out, 0, (size_t)l->stride);
        for (int k = 0; k < PI_PARTS; k++)
            if (l->is.row_type[k] >= 0)
                pi_pack_planar(at + l->is.place[k] - l->begin, l->is.row_type[k], l->is.bundle->columns, k == PI_DOWN,
                               out + (l->is.bundle->part[k].data - l->memory));
    }
}

static void note_fault(pi_records *s, pi_unit_fault fault) {
    if (!s->fault.error) s->fault = fault;
    atomic_store(&s->broken, 1);
}

static void finish(pi_records *s, const job *j, int error) {
    layer *l = &s->layers[j->layer];
    int64_t awaited = 0;
    s->counters.read_bytes += read_bytes(l, j);
    if (error) note_fault(s, (pi_unit_fault){error, l->is.file, read_offset(l, j), read_bytes(l, j)});
    for (int64_t i = j->first; i < j->first + j->count; i++) {
        l->records[i].state = HERE;
        awaited += l->records[i].pass == s->pass;
    }
    s->coming -= j->count;
    atomic_fetch_sub(&s->awaited, awaited);
}

/* Lays out one read that arrives, and begins others in its room; 0 where none is under way that nobody works on. */
static int work(pi_records *s) {
    pi_disk_arrival arrival;
    if (!pi_disk_queue_take(s->reads, &arrival)) return 0;
    const job j = arrival.slot < 0 ? (job){0} : s->under_way[arrival.slot];
    if (!arrival.error) lay_out(&s->layers[j.layer], &j, arrival.bytes);
    pthread_mutex_lock(&s->lock);
    if (arrival.slot < 0)
        note_fault(s, (pi_unit_fault){arrival.error, 0, 0, 0});
    else {
        finish(s, &j, arrival.error);
        pi_disk_queue_release(s->reads, arrival.slot);
    }
    pump(s);
    pthread_mutex_unlock(&s->lock);
    return 1;
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

/* Names the records of a pass and asks for those that are not there; -1 where they do not fit. */
static int name(pi_records *s, int64_t k, const int32_t *list, int64_t count) {
    layer *l = &s->layers[k];
    const int64_t most_steps = all_steps(s);
    int fits = 1;
    if (!list) count = l->count;
    pthread_mutex_lock(&s->lock);
    s->begun = now_ns();
    s->pass++;
    s->awaited = 0;
    for (int64_t n = 0; n < count; n++) note(s, l, list ? list[n] : n);
    for (int64_t n = 0; n < count && fits && !failed(s); n++) {
        const int64_t i = list ? list[n] : n;
        if (l->records[i].state != ABSENT) continue;
        while (!has_room(&s->now) || !make_room(s, l, i, most_steps, 1)) { /* what comes gives its room */
            fits = s->coming > 0 && !failed(s);
            if (!fits) break;
            pump(s);
            pthread_mutex_unlock(&s->lock);
            if (!work(s)) sched_yield();
            pthread_mutex_lock(&s->lock);
        }
        if (!fits) break;
        ask_for(s, &s->now, k, i);
        s->awaited++;
    }
    pump(s);
    pthread_mutex_unlock(&s->lock);
    return fits ? 0 : -1;
}

int pi_records_fetch(pi_records *s, pi_worker *worker, int64_t k, const int32_t *list, int64_t count) {
    const int first = pi_worker_thread(worker) == 0;
    if (s->process != getpid()) return -1; /* a forked child has none of its parent's reads */
    if (first) s->named = name(s, k, list, count);
    pi_barrier(worker);
    if (s->named < 0) return -1;
    while (atomic_load(&s->awaited) > 0 && !failed(s))
        if (!work(s)) sched_yield();
    if (first) {
        pthread_mutex_lock(&s->lock);
        s->counters.wait_nanoseconds += now_ns() - s->begun;
        pthread_mutex_unlock(&s->lock);
    }
    return failed(s) ? -1 : 0;
}

void pi_records_ahead(pi_records *s, int64_t k, const int32_t *list, int64_t count, int certain) {
    if (s->process != getpid()) return;
    layer *l = &s->layers[k];
    const int64_t most_steps = certain ? all_steps(s) : 1;
    pthread_mutex_lock(&s->lock);
    for (int64_t n = 0; n < count && !failed(s); n++) {
        record *r = &l->records[list[n]];
        if (r->state != ABSENT) {
            if (r->state == HERE && !r->use) r->use = 1; /* it is about to be taken */
            continue;
        }
        if (!has_room(&s->ahead) || !make_room(s, l, list[n], most_steps, 0)) break;
        r->ahead = 1;
        r->use = 1;
        ask_for(s, &s->ahead, k, list[n]);
        s->counters.ahead++;
    }
    pump(s);
    pthread_mutex_unlock(&s->lock);
}

/* ---- looking ---- */

int64_t pi_records_memory(const pi_records *s) { return s->pages * PI_PAGE + s->reading_bytes; }
int pi_records_asynchronous(const pi_records *s) { return pi_disk_queue_is_asynchronous(s->reads); }
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
    l->moving = calloc((size_t)l->count / 64 + 1, sizeof *l->moving);
    return l->records && l->page_users && l->moving ? 0 : -1;
}

static int make_queue(job_queue *q, int64_t room) {
    q->jobs = calloc((size_t)room + 1, sizeof *q->jobs);
    q->room = room;
    return q->jobs ? 0 : -1;
}

static int make(pi_records *s, const int *descriptors, const int *direct, const pi_record_layer *layers) {
    s->files = calloc((size_t)s->file_count + 1, sizeof *s->files);
    s->layers = calloc((size_t)s->layer_count + 1, sizeof *s->layers);
    if (!s->files || !s->layers) return -1;
    for (int64_t i = 0; i < s->file_count; i++)
        if (pi_disk_file_note(&s->files[i], descriptors[i], direct[i]) < 0) return -1;
    for (int64_t k = 0; k < s->layer_count; k++) {
        layer *l = &s->layers[k];
        if (make_layer(l, &layers[k]) < 0) return -1;
        if (most_at_once(l) * l->is.bytes + 2 * PI_PAGE > s->reading_bytes) {
            errno = EINVAL;
            return -1;
        }
        s->most = l->count > s->most ? l->count : s->most;
    }
    s->list = calloc((size_t)s->most + 16, sizeof *s->list);
    s->marks = calloc((size_t)s->most + 16, 1);
    if (!s->list || !s->marks) return -1;
    s->reads = pi_disk_queue_new(s->reading_bytes);
    if (!s->reads) return -1;
    return make_queue(&s->now, s->most) < 0 || make_queue(&s->ahead, s->most) < 0 ? -1 : 0;
}

static void release(pi_records *s) {
    pi_disk_queue_free(s->reads);
    for (int64_t k = 0; s->layers && k < s->layer_count; k++) {
        free(s->layers[k].records);
        free(s->layers[k].page_users);
        free(s->layers[k].moving);
    }
    free(s->files);
    free(s->layers);
    free(s->list);
    free(s->marks);
    free(s->now.jobs);
    free(s->ahead.jobs);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

pi_records *pi_records_new(const int *descriptors, const int *direct, int files, const pi_record_layer *layers,
                           int64_t layer_count, int64_t pages, int64_t reading_bytes) {
    pi_records *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->file_count = files;
    s->layer_count = layer_count;
    s->pages = pages;
    s->reading_bytes = (reading_bytes + PI_PAGE - 1) / PI_PAGE * PI_PAGE;
    s->process = getpid();
    pthread_mutex_init(&s->lock, NULL);
    errno = 0;
    if (make(s, descriptors, direct, layers) < 0) {
        const int error = errno ? errno : ENOMEM;
        release(s);
        errno = error;
        return NULL;
    }
    return s;
}

void pi_records_free(pi_records *s) {
    if (!s) return;
    for (int64_t k = 0; k < s->layer_count; k++)
        madvise(s->layers[k].memory, (size_t)(s->layers[k].count * s->layers[k].stride), MADV_DONTNEED);
    const int64_t files = s->file_count;
    pi_disk_queue_free(s->reads); /* nothing is under way after it */
    s->reads = NULL;
    for (int64_t i = 0; i < files; i++) close(s->files[i].descriptor);
    release(s);
}
