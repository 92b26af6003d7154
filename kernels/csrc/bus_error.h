/* A mapped file that another program shortens while it is read: the end of the process, with a line that names it. */
#ifndef PI_BUS_ERROR_H
#define PI_BUS_ERROR_H

/* From now on SIGBUS ends the process with `code` after a line on standard error. 0, or an errno. */
int pi_guard_mapped_files(int code);

#endif
