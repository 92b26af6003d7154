/* Every operation of a program, declared once: its name, what it takes, and what must hold.
 *
 *   X(NAME, objects, integers, floats, condition)
 *
 * `integers` and `floats` are how many it takes. `objects` has a word for each object, a letter and what follows:
 *   f float32   d float64   i int32   l int64   w uint32   q uint64   b int8   u bytes of rows
 *   M Matrix    B Bundle    U Units    R Records    L tuple of Matrix objects of one size and type, or None
 *   -  of picked rows    |  of picked columns    (else of tiles)
 *   !  the operation writes it      ?  it may be None
 *   =  how many elements it has: a product of
 *        T  most tokens of a run     C  positions of the context     iK  integer K, above zero     a number
 *        r, c  rows and columns of the matrix or bundle              sK  words of a sign code of integer K columns
 *      each with /N or /iK (divided, rounded up) or ^N (rounded up to a multiple) after it; a + behind: or more;
 *      iK?A:B is A where integer K is not zero, else B.
 * `condition` is C, about `i` (the integers) and `m` (boundary.c); it holds for what sizes alone do not say. */
#ifndef PI_OPERATIONS_H
#define PI_OPERATIONS_H

/* Activations of T tokens: q, d, s. */
#define PI_ACTS(columns) "b?=T*" columns "+ f?=T*" columns "/32+ f?=T*" columns "/32+ "
#define PI_ACTS_OUT(columns) "b!?=" columns "+ f!?=" columns "/32+ f!?=" columns "/32+"

#define PI_OPERATIONS(X)                                                                                               \
    X(EMBED, "i=T u=i1*i3+ f!=T*i2", 4, 1,                                                                             \
      pi_rows_readable((int32_t)i[0], i[2]) && pi_row_bytes((int32_t)i[0], i[2]) <= i[3] &&                            \
          rows_aligned(m, 1, i[0], i[3]))                                                                              \
    X(RMS_NORM, "f=T*i0 f?=i2?i0:i0/i1 f!=T*i0", 3, 1, divides(i[1], i[0]) && one_of(i[2], 0, i[0] / i[1]))            \
    X(LAYER_NORM, "f=T*i0 f?=i2?i0:i0/i1 f?=i2?i0:i0/i1 f!=T*i0", 3, 1,                                                \
      divides(i[1], i[0]) && one_of(i[2], 0, i[0] / i[1]))                                                             \
    X(QUANTIZE, "f=T*i0 b!=T*i0+ f!=T*i0/32+ f!=T*i0/32+", 1, 0, divides(PI_BLOCK, i[0]))                              \
    X(MATMUL, "M f?=T*c " PI_ACTS("c") "f?=r f!=T*r", 4, 0, has_input(m, m->row_type, 1) && rows_fit(m, i[2], i[3]))   \
    X(ROPE, "f!=T*i0*i1 f=C*i2+ f=C*i2+", 5, 0, i[3] >= 0 && within(i[3], 1, 0, 2 * i[2], i[1]))                       \
    X(STORE_KV, "f=T*i1 f=T*i2", 3, 0, 1)                                                                              \
    X(ATTENTION, "f f! f?=i1 f?=i1", 4, 2, i[2] >= 0 && i[3] >= 0)                                                     \
    X(ACTIVATE, "f=T*i1 f?=T*i1 f!=T*i1", 2, 1, below(i[0], PI_ACTIVATIONS))                                           \
    X(ADD, "f=i1?T*i0:i0 f!=T*i0", 2, 1, one_of(i[1], 0, i[0]))                                                        \
    X(SUM_ROWS, "f=T*r B f!=T*c", 1, 0, has_part(m, PI_DOWN))                                                          \
    X(SPARSE_FFN, "f=T*r f?=r f=T*c " PI_ACTS("c") "B f!=T*c f!=T*r f!?=T*r f?=r", 3, 1,                               \
      below(i[0], PI_ACTIVATIONS) && below(i[2], 3) && sparse_fits(i, m))                                              \
    X(OBSERVE, "f=T*i1 f?=T*i1 q!=i1 w!?=i1*128 d!=i1 d!=i1", 2, 1, below(i[0], PI_ACTIVATIONS))                       \
    X(KEEP_LARGE, "f=T*i0 f=i0 f!=T*i0", 1, 0, 1)                                                                      \
    X(SIGN_CODE, "f=T*i0 w!=T*s0", 1, 0, 1)                                                                            \
    X(SIGN_SCORES, "w=i0^16*i1/32 w=T*s1 f!=T*i0", 2, 0, 1)                                                            \
    X(MULTIPLY, "f=i2?T*i0/i1:i0/i1 f!=T*i0", 3, 0, divides(i[1], i[0]) && one_of(i[2], 0, i[0] / i[1]))               \
    X(MAP, "f!=T*i1", 2, 4, below(i[0], PI_MAPS))                                                                      \
    X(L2_NORM, "f=T*i0 f!=T*i0", 2, 1, divides(i[1], i[0]))                                                            \
    X(KEEP_TOP, "f=T*i0 f!=T*i0", 2, 1, divides(i[1], i[0]))                                                           \
    X(COPY, "f=T*i0 f!=T*i1", 8, 0, within(i[2], i[4], i[5], i[7], i[0]) && within(i[3], i[4], i[6], i[7], i[1]))      \
    X(SCALE_BY_POSITION, "f!=T*i0 f=C+", 1, 0, 1)                                                                      \
    X(HEAD_MATMUL, "L=i0 f=T*i2 f!=T*i5", 8, 0,                                                                        \
      m->all_there &&i[1] == m->tokens && within(i[3], i[0], i[4], m->columns, i[2]) &&                                \
          within(i[6], i[0], i[7], m->rows, i[5]))                                                                     \
    X(ROUTE, "f=T*i0 f?=i0 i!=T*i1 f!=T*i1 f?=T f!?=T", 6, 1,                                                          \
      i[0] <= PI_MAX_EXPERTS && i[1] <= i[0] && divides(i[2], i[0]) && i[3] >= 1 && i[3] <= i[2] &&                    \
          i[1] <= i[0] / i[2] * i[3] && given(m, 4) == given(m, 5))                                                    \
    X(EXPERT_GATHER, "i=T*i1 f=T*i1 L=i0 f=T*i3 " PI_ACTS("i3") "f!=T*i1*i3 " PI_ACTS_OUT("T*i1*i3"), 6, 0,            \
      experts_fit(i, m) && given(m, 8) <= given(m, 4) && together(m, 4) && together(m, 8) &&                           \
          (!given(m, 8) || divides(PI_BLOCK, i[3])))                                                                   \
    X(EXPERT_MATMUL, "i=T*i1 L=i0 f=T*c+ " PI_ACTS("c") "f=T*i1*c " PI_ACTS("i1*c") "f?=i0*r f?=i0 f!=T*i1*r", 5, 0,   \
      experts_fit(i, m) && has_input(m, m->row_type, 2) && has_input(m, m->row_type, 6))                               \
    X(EXPERT_ACTIVATE, "i=T*i1 L=i0 f=T*i1*i4 f?=T*i1*i4 f!=T*i1*i4 " PI_ACTS_OUT("T*i1*i4"), 5, 1,                    \
      experts_fit(i, m) && below(i[3], PI_ACTIVATIONS) && together(m, 5) && (!given(m, 5) || divides(PI_BLOCK, i[4]))) \
    X(EXPERT_SUM, "i=T*i1 f=T*i1 L=i0 f=T*i1*i3 f!=T*i3", 6, 0, experts_fit(i, m))                                     \
    X(EXPERT_COUNT, "i=T*i1 f=T*i1 l!=2 q!?=i0 d!?=i0 d!?=i0", 3, 0,                                                   \
      i[1] <= i[0] && i[2] == m->tokens && given(m, 3) == given(m, 4) && given(m, 3) == given(m, 5))                   \
    X(CONVOLVE, "f=T*i1 f=i4*i3 f?=i3 f!=T*i3", 6, 0, i[4] >= 2 && within(i[2], 1, 0, i[3], i[1]))                     \
    X(SCAN_CHANNELS, "f=T*i1+ f=T*i2 f=i5*i2 f=T*i6 f=i2 f!=T*i2*i3", 9, 0,                                            \
      within(0, i[2], i[3], i[3], i[1]) && within(i[7], i[4], i[5], i[5], i[6]) &&                                     \
          within(i[8], i[4], i[5], i[5], i[6]))                                                                        \
    X(SCAN_HEADS, "f=T*i1 f=T*i2 f=i2 f=T*i6 f=i2 f!=T*i2*i3", 9, 0,                                                   \
      divides(i[4], i[2]) && within(0, i[2], i[3], i[3], i[1]) && within(i[7], i[4], i[5], i[5], i[6]) &&              \
          within(i[8], i[4], i[5], i[5], i[6]))                                                                        \
    X(DELTA_NET, "f=T*2*i3*i4 f=T*i5 f=T*i1*i8 f=T*i1 f!=T*i1*i2", 9, 1,                                               \
      divides(i[3], i[1]) && (i[8] == 1 || i[8] == i[4]) && within(i[6], i[1], i[2], i[2], i[5]))                      \
    X(GENERAL_DELTA, "f=T*i1*i2 f=T*i1*i2 f=T*i1*i3 f=T*i1*i2 f=T*i1*i2 f=T*i1*i2 f!=T*i1*i3", 4, 0, 1)                \
    X(COMBINE, "f=T*i0*i1 f=T*i2*i0 f!=T*i2*i1", 3, 0, 1)                                                              \
    X(FETCH, "U i?=T*i2 i?=T*i5 i?=T*i8", 9, 0, units_fit(m, i) && later_fit(m, 2, i + 3) && later_fit(m, 3, i + 6))   \
    X(EXPERT_ROWS, "i=T*i1 L-=i0 f=T*c+ " PI_ACTS("c") "f=T*i1*c " PI_ACTS("i1*c") "f?=i0*r f=T*i1*r f!=T*i1*r", 5, 1, \
      experts_fit(i, m) && i[4] == m->rows && has_input(m, m->row_type, 2) && has_input(m, m->row_type, 6))            \
    X(EXPERT_COLUMNS, "i=T*i1 L|=i0 " PI_ACTS("i1*c") "f?=i0*r f!=T*i1*r", 3, 0,                                       \
      experts_fit(i, m) && given(m, 2) && given(m, 3) && given(m, 4))                                                  \
    X(FETCH_RECORDS, "R f=T*i1 f?=i1", 6, 0,                                                                           \
      records_fit(m, i) && below(i[2], 3) && below(i[3], PI_NEEDED_WAYS) && (!i[2] || given(m, 2)) &&                  \
          within(i[4], 1, 0, i[5], i[1]) && (i[3] || i[5] == i[1]))

#endif
