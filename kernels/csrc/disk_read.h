/* Files that weights are read from while a program runs: direct reads, and faults with their place. */
#ifndef PI_DISK_READ_H
#define PI_DISK_READ_H

#include <stdint.h>
#include <sys/stat.h>

enum {                       /* pi_unit_fault.error, beside the numbers of errno */
       PI_UNIT_SHORT = -1,   /* the file ends before the unit */
       PI_UNIT_CHANGED = -2, /* the file was written to since it was opened */
};

typedef struct {
    int error; /* 0: none */
    int32_t file;
    int64_t offset, bytes;
} pi_unit_fault;

typedef struct {
    int descriptor, direct; /* direct: past the page cache, whole pages at a time */
    struct stat stamp;      /* when it was opened */
} pi_disk_file;

enum { PI_PAGE = 4096 };

typedef struct { /* what has to be read for some bytes: where it begins, how much, and what of it comes before them */
    int64_t first, bytes, skip;
} pi_disk_hull;

/* 0, or -1 with errno set. */
int pi_disk_file_note(pi_disk_file *file, int descriptor, int direct);
/* Reads `bytes` from `offset` on into `staging`, aligned to a page, which has room for two pages more; where they begin
 * there goes to `begin`. 0, or what failed. */
int pi_disk_read(const pi_disk_file *file, int64_t offset, int64_t bytes, uint8_t *staging, const uint8_t **begin);
pi_disk_hull pi_disk_hull_of(const pi_disk_file *file, int64_t offset, int64_t bytes);
/* After a read of `hull`: nothing of it stays in the page cache. 0, or that the file was changed. */
int pi_disk_finish(const pi_disk_file *file, pi_disk_hull hull);

#endif
