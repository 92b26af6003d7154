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

int pi_disk_read(const pi_disk_file *file, int64_t offset, int64_t bytes, uint8_t *staging, const uint8_t **begin) {
    const int64_t first = file->direct ? offset / PI_PAGE * PI_PAGE : offset, skip = offset - first;
    const int64_t wanted = file->direct ? (skip + bytes + PI_PAGE - 1) / PI_PAGE * PI_PAGE : bytes;
    int64_t done = 0;
    while (done < skip + bytes) {
        const ssize_t count = pread(file->descriptor, staging + done, (size_t)(wanted - done), first + done);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        if (count == 0) return PI_UNIT_SHORT;
        done += count;
        if (file->direct && done % PI_PAGE && done < skip + bytes) return PI_UNIT_SHORT;
    }
    if (!file->direct) posix_fadvise(file->descriptor, first, wanted, POSIX_FADV_DONTNEED);
    *begin = staging + skip;
    return was_changed(file);
}
