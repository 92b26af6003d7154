#include "boundary.h"

#include "transcode.h"

#include <string.h>

/* ---- sizes of weights and slots ---- */

int pi_rows_readable(int32_t row_type, int64_t columns) {
    return row_type >= 0 && row_type < PI_TYPES && columns < PI_LARGEST && pi_row_bytes(row_type, columns) > 0 &&
           pi_has_grid(row_type);
}

int64_t pi_rows_bytes(int32_t row_type, int64_t rows, int64_t columns) {
    int64_t bytes;
    if (rows > 0 && rows < (1LL << 46) && pi_rows_readable(row_type, columns) &&
        !__builtin_mul_overflow(rows, pi_row_bytes(row_type, columns), &bytes) && bytes < (1LL << 60))
        return bytes;
    PyErr_Format(pi_kernel_error, "there are no %lld rows of %lld values of type %d", (long long)rows,
                 (long long)columns, (int)row_type);
    return -1;
}

int pi_slot_possible(int kind, const int64_t sizes[4]) {
    if (kind == PI_SLOT_RECURRENT) return sizes[0] > 0 && sizes[0] < PI_LARGEST;
    if (kind != PI_SLOT_KV || sizes[0] < 1 || sizes[0] >= 4LL * PI_LARGEST || sizes[1] < 1 || sizes[1] > (1 << 16))
        return 0;
    for (int k = 2; k < 4; k++)
        if (sizes[k] < 2 || sizes[k] > PI_MAX_HEAD_DIM || sizes[k] % 2) return 0;
    return 1;
}

/* ---- conditions ---- */

static int given(const pi_given *m, int k) { return m->given >> k & 1; }
static int below(int64_t value, int64_t end) { return value >= 0 && value < end; }
static int one_of(int64_t value, int64_t a, int64_t b) { return value == a || value == b; }
static int divides(int64_t part, int64_t whole) { return part > 0 && whole > 0 && whole % part == 0; }

/* `times` ranges of `count` values, the first at `first` and each `step` after the one before, lie in `width` values. */
static int within(int64_t first, int64_t times, int64_t step, int64_t count, int64_t width) {
    return first >= 0 && times >= 1 && step >= 0 && count >= 1 && first + (times - 1) * step + count <= width;
}

/* Rows of that type have their input: floats at object k, or quantised activations in the three after it. */
static int has_input(const pi_given *m, int32_t row_type, int k) {
    return pi_row_is_float(row_type) ? given(m, k) : given(m, k + 1) && given(m, k + 2) && given(m, k + 3);
}

static int has_part(const pi_given *m, int part) { return m->bundle && m->bundle->part[part].data != NULL; }

/* Three objects that go together: activations. */
static int together(const pi_given *m, int k) {
    return given(m, k) == given(m, k + 1) && given(m, k) == given(m, k + 2);
}

/* Rows of float types are read as such where they lie. */
static int rows_aligned(const pi_given *m, int k, int64_t row_type, int64_t stride) {
    const uint64_t part = row_type == PI_F32 ? 4 : row_type == PI_MXFP4 ? 1 : 2;
    return (uint64_t)(uintptr_t)m->p[k] % part == 0 && (uint64_t)stride % part == 0;
}

static int experts_fit(const int64_t *i, const pi_given *m) {
    return i[0] <= PI_MAX_EXPERTS && i[1] <= i[0] && i[2] == m->tokens;
}

/* A group of units, i[0] … i[0] + i[1], of which a token takes i[2]. */
static int units_fit(const pi_given *m, const int64_t *i) {
    return i[0] >= 0 && i[1] >= i[2] && i[2] > 0 && i[0] + i[1] <= m->units;
}

/* Units of a later layer, or none. */
static int later_fit(const pi_given *m, int k, const int64_t *i) {
    return units_fit(m, i) || (!given(m, k) && !i[0] && !i[1] && !i[2]);
}

/* Rows [first, first + count) of the matrix, whole tiles of it. */
static int rows_fit(const pi_given *m, int64_t first, int64_t count) {
    return first >= 0 && count >= 1 && count <= m->rows && first <= m->rows - count && first % PI_TILE == 0 &&
           ((first + count) % PI_TILE == 0 || first + count == m->rows);
}

/* Layer i[0] has i[1] neurons. */
static int records_fit(const pi_given *m, const int64_t *i) {
    return m->records && below(i[0], pi_records_layers(m->records)) && i[1] == pi_records_neurons(m->records, i[0]);
}

/* A bundle may have rows that the operation does not read: other operations share it. */
static int sparse_fits(const int64_t *i, const pi_given *m) {
    const int by_value = i[2] == PI_BY_VALUE, by_up = i[2] == PI_BY_UP_SIZE;
    const int reads[PI_DOWN] = {[PI_GATE] = by_value ? given(m, 9) : by_up,
                                [PI_UP] = by_value ? has_part(m, PI_UP) : !by_up};
    if (!has_part(m, PI_DOWN)) return 0;
    if ((!by_value && !given(m, 1)) || (given(m, 10) && !given(m, 9))) return 0;
    for (int k = 0; k < PI_DOWN; k++)
        if (reads[k] && (!has_part(m, k) || !has_input(m, m->bundle->part[k].row_type, 2))) return 0;
    return 1;
}

#define CONDITION(NAME, objects, integers, floats, condition) \
    case PI_OP_##NAME: return condition;

static int holds(const pi_given *m, pi_op_kind kind) {
    const int64_t *i = m->i;
    switch (kind) {
        PI_OPERATIONS(CONDITION)
    default: return 0;
    }
}

#define SHAPE(NAME, objects, integers, floats, condition) [PI_OP_##NAME] = {#NAME, objects, integers, floats},
const pi_op_shape pi_op_shapes[PI_OP_KINDS] = {PI_OPERATIONS(SHAPE)};

int pi_judge_condition(const pi_given *m, pi_op_kind kind) {
    if (holds(m, kind)) return 0;
    PyErr_Format(pi_kernel_error, "%s: its sizes or its parts do not go together", pi_op_shapes[kind].name);
    return -1;
}

int pi_object_count(const pi_op_shape *shape) {
    int count = 1;
    for (const char *c = shape->objects; *c; c++) count += *c == ' ';
    return count;
}

/* ---- sizes ---- */

const char *pi_object_word(const pi_op_shape *shape, int k) {
    const char *word = shape->objects;
    for (; k > 0 && word; k--) {
        word = strchr(word, ' ');
        if (word) word++;
    }
    return word && *word ? word : NULL;
}

int pi_word_has(const char *word, char flag) {
    for (const char *c = word + 1; *c && *c != ' ' && *c != '='; c++)
        if (*c == flag) return 1;
    return 0;
}

static int64_t number(const char **at) {
    int64_t value = 0;
    for (; **at >= '0' && **at <= '9'; (*at)++) value = value * 10 + (**at - '0');
    return value;
}

static int64_t round_up(int64_t value, int64_t part) { return part > 0 ? (value + part - 1) / part : -1; }

/* One factor; -1 where it is not above zero. */
static int64_t factor(const pi_given *m, const char **at) {
    int64_t value = -1;
    switch (**at) {
    case 'T': value = m->tokens, (*at)++; break;
    case 'C': value = m->capacity, (*at)++; break;
    case 'r': value = m->rows, (*at)++; break;
    case 'c': value = m->columns, (*at)++; break;
    case 'i': (*at)++, value = m->i[number(at)]; break;
    case 's':
        (*at)++, value = m->i[number(at)];
        if (value > 0 && value < PI_LARGEST) value = pi_sign_code_words(value);
        break;
    default: value = number(at);
    }
    while (**at == '/' || **at == '^') {
        char operation = *(*at)++;
        int64_t part = **at == 'i' ? ((*at)++, m->i[number(at)]) : number(at);
        value = round_up(value, part);
        if (operation == '^') value *= part;
    }
    return value > 0 ? value : -1;
}

/* The product at `*at`, or -1 where it has no size that could be. */
static int64_t product(const pi_given *m, const char **at) {
    int64_t value = 1, next;
    for (;; (*at)++) {
        if ((next = factor(m, at)) < 0 || __builtin_mul_overflow(value, next, &value)) value = -1;
        if (value < 0) {
            *at += strcspn(*at, "*:+ ");
            value = -1;
        }
        if (**at != '*') return value;
        if (value < 0) value = -1;
    }
}

/* Elements that `word` wants, and whether there may be more; -1: impossible sizes, -2: any number. */
static int64_t wanted(const pi_given *m, const char *word, int *or_more) {
    const char *at = word + strcspn(word, "= ");
    *or_more = 0;
    if (*at != '=') return -2;
    at++;
    const char *question = at + strcspn(at, "? ");
    int64_t value;
    if (*question == '?') { /* iK?A:B */
        at++;
        int64_t chosen = m->i[number(&at)];
        at++;
        if (!chosen) at += strcspn(at, ":") + 1;
    }
    value = product(m, &at);
    *or_more = *at == '+';
    return value;
}

/* ---- objects ---- */

static int fault(const pi_op_shape *shape, int k, const char *what) {
    PyErr_Format(pi_kernel_error, "%s: object %d %s", shape->name, k, what);
    return -1;
}

static int note_matrix(pi_given *m, const pi_matrix *matrix) {
    if (!matrix->tiles) {
        PyErr_SetString(pi_kernel_error, "a matrix was not initialised");
        return -1;
    }
    if (m->rows && (m->rows != matrix->rows || m->columns != matrix->columns || m->row_type != matrix->row_type)) {
        PyErr_SetString(pi_kernel_error, "matrices of one operation differ in size or type");
        return -1;
    }
    m->rows = matrix->rows;
    m->columns = matrix->columns;
    m->row_type = matrix->row_type;
    return 0;
}

int pi_note_weights(pi_given *m, PyObject *object) {
    if (PyObject_TypeCheck(object, pi_matrix_type)) return note_matrix(m, &((matrix_object *)object)->matrix);
    if (PyObject_TypeCheck(object, pi_bundle_type)) {
        m->bundle = &((bundle_object *)object)->bundle;
        m->rows = m->bundle->rows;
        m->columns = m->bundle->columns;
        return 0;
    }
    if (PyObject_TypeCheck(object, pi_units_type)) {
        const units_object *units = (units_object *)object;
        m->units = units->units ? pi_units_count(units->units) : 0;
    }
    if (PyObject_TypeCheck(object, pi_records_type)) m->records = ((records_object *)object)->records;
    if (!PyTuple_Check(object)) return 0;
    m->all_there = 1;
    for (Py_ssize_t k = 0; k < PyTuple_Size(object); k++) {
        PyObject *item = PyTuple_GetItem(object, k);
        if (item == Py_None)
            m->all_there = 0;
        else if (!PyObject_TypeCheck(item, pi_matrix_type)) {
            PyErr_SetString(pi_kernel_error, "a list of matrices has an object that is none");
            return -1;
        } else if (note_matrix(m, &((matrix_object *)item)->matrix) < 0)
            return -1;
    }
    if (m->rows) return 0;
    PyErr_SetString(pi_kernel_error, "a list of matrices has none");
    return -1;
}

typedef struct {
    char letter;
    const char *formats; /* of the buffer protocol */
    int size;
} element;

static const element elements[] = {{'f', "f", 4},  {'d', "d", 8},  {'i', "il", 4}, {'l', "lq", 8},
                                   {'w', "IL", 4}, {'q', "LQ", 8}, {'b', "b", 1},  {'u', "B", 1}};

static const element *element_of(char letter) {
    for (size_t k = 0; k < sizeof elements / sizeof *elements; k++)
        if (elements[k].letter == letter) return &elements[k];
    return NULL;
}

static int judge_buffer(pi_given *m, const pi_op_shape *shape, int k, const char *word, const Py_buffer *view) {
    const element *kind = element_of(*word);
    const char *format = view->format ? view->format : "B";
    int or_more;
    int64_t count = wanted(m, word, &or_more), values = view->len / kind->size;
    if (view->itemsize != kind->size || strlen(format) != 1 || !strchr(kind->formats, *format))
        return fault(shape, k, "holds values of another type");
    if ((uintptr_t)view->buf % (uintptr_t)kind->size) return fault(shape, k, "is not aligned to its values");
    m->values[k] = values;
    if (count == -1) return fault(shape, k, "has impossible sizes");
    if (count != -2 && (or_more ? values < count : values != count)) {
        PyErr_Format(pi_kernel_error, "%s: object %d has %lld values, expected %lld%s", shape->name, k,
                     (long long)values, (long long)count, or_more ? " or more" : "");
        return -1;
    }
    return 0;
}

/* Whether the weights of `object`, a matrix or a tuple of some, lie in memory as `word` says. */
static int laid_out(const char *word, PyObject *object) {
    const int32_t wanted = pi_word_has(word, '-')   ? PI_PICKED_ROWS
                           : pi_word_has(word, '|') ? PI_PICKED_COLUMNS
                                                    : PI_TILES;
    if (!PyTuple_Check(object)) return ((matrix_object *)object)->matrix.layout == wanted;
    for (Py_ssize_t k = 0; k < PyTuple_Size(object); k++) {
        PyObject *item = PyTuple_GetItem(object, k);
        if (item != Py_None && ((matrix_object *)item)->matrix.layout != wanted) return 0;
    }
    return 1;
}

int pi_judge_object(pi_given *m, const pi_op_shape *shape, int k, PyObject *object, Py_buffer *view) {
    const char *word = pi_object_word(shape, k);
    if (object == Py_None) return pi_word_has(word, '?') ? 0 : fault(shape, k, "is missing");
    m->given |= 1u << k;
    int or_more;
    switch (*word) {
    case 'M':
        if (!m->rows || !PyObject_TypeCheck(object, pi_matrix_type)) return fault(shape, k, "is no Matrix");
        return laid_out(word, object) ? 0 : fault(shape, k, "has another layout");
    case 'U': return m->units && PyObject_TypeCheck(object, pi_units_type) ? 0 : fault(shape, k, "is no open Units");
    case 'R':
        return m->records && PyObject_TypeCheck(object, pi_records_type) ? 0 : fault(shape, k, "are no open Records");
    case 'B': return m->rows && PyObject_TypeCheck(object, pi_bundle_type) ? 0 : fault(shape, k, "is no Bundle");
    case 'L':
        if (!PyTuple_Check(object)) return fault(shape, k, "is no tuple of Matrix objects");
        if (PyTuple_Size(object) != wanted(m, word, &or_more)) return fault(shape, k, "has another number of matrices");
        return laid_out(word, object) ? 0 : fault(shape, k, "has another layout");
    }
    if (!PyObject_CheckBuffer(object)) return fault(shape, k, "is no buffer");
    int flags = PyBUF_FORMAT | PyBUF_ND | (pi_word_has(word, '!') ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, view, flags) < 0) {
        PyErr_Clear();
        return fault(shape, k,
                     pi_word_has(word, '!') ? "is not contiguous, or cannot be written" : "is not contiguous");
    }
    if (judge_buffer(m, shape, k, word, view) == 0) return 1;
    PyBuffer_Release(view);
    return -1;
}
