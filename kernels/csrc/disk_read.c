#include "disk_read.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

int pi_disk_file_note(pi_disk_file *file, int descriptor, int direct) {
    file->descriptor = descriptor;
    file->direct = direct;
    return fstat(descriptor, &file->stamp) < 0 ? -1 : 0;
}

static int was_changed(const pi_disk_file *file) {
    struct stat is;
    if (fstat(file->descriptor, &is) < 0) return errno;
    return is.st_size != file->stamp.st_size || is.st_mtim.tv_sec != file->stamp.st_mtim.tv_sec ||
                   is.st_mtim.tv_nsec != file->stamp.st_mtim.tv_nsec
               ? PI_UNIT_CHANGED
               : 0;
}

pi_disk_hull pi_disk_hull_of(const pi_disk_file *file, int64_t offset, int64_t bytes) {
    const int64_t first = file->direct ? offset / PI_PAGE * PI_PAGE : offset, skip = offset - first;
    return (pi_disk_hull){first, file->direct ? (skip + bytes + PI_PAGE - 1) / PI_PAGE * PI_PAGE : bytes, skip};
}

int pi_disk_finish(const pi_disk_file *file, pi_disk_hull hull) {
    if (!file->direct) posix_fadvise(file->descriptor, hull.first, hull.bytes, POSIX_FADV_DONTNEED);
    return was_changed(file);
}

int pi_disk_read(const pi_disk_file *file, int64_t offset, int64_t bytes, uint8_t *staging, const uint8_t **begin) {
    const pi_disk_hull hull = pi_disk_hull_of(file, offset, bytes);
    const int64_t least = hull.skip + bytes;
    int64_t done = 0;
    while (done < least) {
        const ssize_t count = pread(file->descriptor, staging + done, (size_t)(hull.bytes - done), hull.first + done);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        if (count == 0) return PI_UNIT_SHORT;
        done += count;
        if (file->direct && done % PI_PAGE && done < least) return PI_UNIT_SHORT;
    }
    *begin = staging + hull.skip;
    return pi_disk_finish(file, hull);
}
