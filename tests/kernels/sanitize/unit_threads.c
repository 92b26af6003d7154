/* Units on disk under ThreadSanitizer: one thread takes units and reads what is in them, readers bring them, and another
 * thread asks what happened. Ends with 0, or says what is wrong. Built and run by scripts/sanitize.sh. */
#include "units.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { GROUPS = 4, UNITS = 6, ALL = GROUPS * UNITS, USED = 2, SLOTS = 9, ROWS = 40, COLUMNS = 64, READERS = 3 };
enum { TILES = (ROWS + PI_TILE - 1) / PI_TILE, ROW = COLUMNS / 32 * 18, FIRST = 100, ROUNDS = 300 };

static pi_matrix matrices[ALL];
static uint8_t *packed; /* what each unit is to hold */
static int64_t unit_bytes;

static void fail(const char *what) {
    fprintf(stderr, "units: %s\n", what);
    exit(1);
}

/* A file of all rows, and what they are once packed. */
static int make_file(void) {
    char name[] = "/tmp/powerinfer-units-XXXXXX";
    const int file = mkstemp(name);
    uint8_t *rows = malloc((size_t)ALL * ROWS * ROW);
    unit_bytes = TILES * pi_tile_bytes(PI_Q4_0, COLUMNS);
    packed = calloc(ALL, (size_t)unit_bytes);
    if (file < 0 || !rows || !packed) fail("no file or memory");
    unlink(name);
    for (int i = 0; i < ALL * ROWS * ROW; i++) rows[i] = (uint8_t)(i * 2654435761u >> 13);
    for (int u = 0; u < ALL; u++)
        pi_pack_tiles(rows + (size_t)u * ROWS * ROW, PI_Q4_0, ROWS, COLUMNS, 0, TILES, packed + u * unit_bytes);
    if (pwrite(file, rows, (size_t)ALL * ROWS * ROW, FIRST) != ALL * ROWS * ROW) fail("the file was not written");
    free(rows);
    return file;
}

static pi_units *open_units(int file) {
    pi_unit_spec specs[ALL];
    pi_unit_part parts[ALL];
    for (int u = 0; u < ALL; u++) {
        matrices[u] = (pi_matrix){.row_type = PI_Q4_0, .rows = ROWS, .columns = COLUMNS, .tiles = TILES};
        matrices[u].tile_bytes = pi_tile_bytes(PI_Q4_0, COLUMNS);
        specs[u] = (pi_unit_spec){0, u, 1};
        parts[u] = (pi_unit_part){&matrices[u], PI_Q4_0, 0, FIRST + (int64_t)u * ROWS * ROW, 0, 1};
    }
    const int descriptor = dup(file), direct = 0;
    const pi_slot_kind_spec slots = {SLOTS, (unit_bytes + 4095) / 4096 * 4096};
    pi_units *units =
        pi_units_new(&descriptor, &direct, 1, &slots, 1, specs, ALL, parts, (pi_unit_policy){READERS, 4.0});
    if (!units) fail("no memory");
    return units;
}

static atomic_int stop;

static void *observer(void *units) {
    int64_t taken[ALL];
    while (!atomic_load(&stop)) {
        const pi_unit_counters c = pi_units_counters(units);
        if (c.hits > c.taken || pi_units_fault(units).error) fail("counters make no sense");
        pi_units_taken(units, taken);
    }
    return NULL;
}

/* Two experts of each group in turn, the next groups' asked for: often those, sometimes others. */
static void take(pi_units *units, unsigned *seed, int rounds) {
    for (int i = 0; i < rounds; i++) {
        const int group = i % GROUPS;
        int32_t chosen[1 + PI_UNITS_AHEAD][USED];
        pi_unit_demand now = {chosen[0], (int64_t)group * UNITS, UNITS, USED}, next[PI_UNITS_AHEAD] = {{0}};
        for (int d = 0; d <= PI_UNITS_AHEAD; d++) {
            chosen[d][0] = rand_r(seed) % (UNITS - 1);
            chosen[d][1] = chosen[d][0] + 1;
            if (d) next[d - 1] = (pi_unit_demand){chosen[d], (int64_t)((group + d) % GROUPS) * UNITS, UNITS, USED};
        }
        if (pi_units_fetch(units, &now, next, 1) < 0) fail("a fetch failed");
        for (int k = 0; k < USED; k++) {
            const int64_t u = now.first + chosen[0][k];
            if (memcmp(matrices[u].data, packed + u * unit_bytes, (size_t)unit_bytes))
                fail("a unit holds something else");
        }
    }
}

static void check_a_short_file(pi_units *units, int file) {
    const int32_t all[ALL] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};
    if (ftruncate(file, FIRST) < 0) fail("ftruncate");
    for (int group = 0; group < GROUPS; group++) {
        const pi_unit_demand now = {NULL, (int64_t)group * UNITS, UNITS, UNITS}, next[PI_UNITS_AHEAD] = {{0}};
        if (pi_units_fetch(units, &now, next, 1) < 0) break;
        if (group == GROUPS - 1) fail("a file that was cut brought units");
    }
    if (!pi_units_fault(units).error || pi_units_load(units, all, 1, 0) >= 0) fail("a fault was forgotten");
}

int main(void) {
    const int file = make_file();
    unsigned seed = 1;
    for (int i = 0; i < 3; i++) {
        pi_units *units = open_units(file);
        pthread_t other;
        atomic_store(&stop, 0);
        if (pthread_create(&other, NULL, observer, units)) fail("pthread_create");
        take(units, &seed, ROUNDS + i);
        atomic_store(&stop, 1);
        pthread_join(other, NULL);
        if (i == 2) check_a_short_file(units, file);
        pi_units_free(units); /* while what was asked for ahead is being read */
    }
    pi_units_free(open_units(file)); /* one that never ran */
    close(file);
    free(packed);
    puts("units: no fault");
    return 0;
}
