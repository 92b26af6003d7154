/* The handler of SIGBUS. It cannot go on: what it would have read is gone, and no result may be made of anything else.
 * So it says which file that was, which /proc/self/maps knows, and ends the process. Nothing here but system calls that
 * a handler may make. */
#include "bus_error.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { NAME = 512, CHUNK = 4096 };

static int exit_code;
/* Threads of a pool may run into the same file at once: the first of them speaks, and ends the others. */
static atomic_flag ending = ATOMIC_FLAG_INIT;

static void say(const char *text) {
    for (size_t left = strlen(text); left > 0;) {
        ssize_t written = write(2, text, left);
        if (written <= 0) return;
        text += written;
        left -= (size_t)written;
    }
}

/* Reads /proc/self/maps byte by byte: "begin-end perms offset device inode   path". */
typedef struct {
    uintptr_t number[2]; /* begin, end */
    int numbers, fields;
    size_t length;
    char name[NAME];
} map_line;

static int digit_of(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

static void take(map_line *line, char c) {
    if (line->length > 0) {
        if (line->length < NAME - 1) line->name[line->length++] = c < ' ' || c == 127 ? '?' : c;
    } else if (line->numbers < 2 && digit_of(c) >= 0) {
        line->number[line->numbers] = line->number[line->numbers] << 4 | (uintptr_t)digit_of(c);
    } else if (line->numbers < 2) {
        line->numbers++;
    } else if (c == '/') {
        line->name[line->length++] = c;
    }
}

/* The file that is mapped at `address` into `line`; 0 where none is. */
static int find_file(uintptr_t address, map_line *line) {
    char chunk[CHUNK];
    ssize_t count;
    int file = open("/proc/self/maps", O_RDONLY | O_CLOEXEC), found = 0;
    memset(line, 0, sizeof *line);
    while (file >= 0 && !found && (count = read(file, chunk, sizeof chunk)) > 0) {
        for (ssize_t i = 0; i < count && !found; i++) {
            if (chunk[i] != '\n') {
                take(line, chunk[i]);
                continue;
            }
            found = line->length > 0 && line->number[0] <= address && address < line->number[1];
            if (!found) memset(line, 0, sizeof *line);
        }
    }
    if (file >= 0) close(file);
    return found;
}

static void on_bus_error(int number, siginfo_t *info, void *context) {
    map_line line;
    (void)number, (void)context;
    while (atomic_flag_test_and_set(&ending)) pause();
    say("powerinfer: ");
    if (find_file((uintptr_t)info->si_addr, &line)) {
        say(line.name);
        say(": became shorter, or cannot be read any more, while it was in use; nothing was made of it\n");
    } else {
        say("memory cannot be read any more (SIGBUS)\n");
    }
    _exit(exit_code);
}

int pi_guard_mapped_files(int code) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    exit_code = code;
    return sigaction(SIGBUS, &action, NULL) == 0 ? 0 : errno;
}
