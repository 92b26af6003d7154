/* Measures how fast the threads of a pool read memory together. */
#ifndef PI_BANDWIDTH_H
#define PI_BANDWIDTH_H

#include "kernels.h"
#include "pool.h"

/* Best bytes per second over passes of `bytes` of memory during `seconds`, on huge pages or normal ones; 0 with
 * *error = errno. */
double pi_read_bandwidth(pi_pool *pool, const pi_kernels *kernels, int64_t bytes, double seconds, int huge, int *error);

#endif
