/* Routers of mixtures of experts: which experts each token takes, and their weights. In double, token by token: a
 * token's choice does not depend on those beside it. */
#include "program.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double sigmoid(double x) {
    const double bounded = x < -80.0 ? -80.0 : x > 80.0 ? 80.0 : x;
    return 1.0 / (1.0 + exp(-bounded));
}

/* Σ x_i, rounded once (Shewchuk 1997): partial sums that do not overlap, added from the largest down until one does
 * not fit; a half is then rounded towards the rest. At most PI_MAX_EXPERTS values, none negative. */
static double exact_sum(const double *x, int64_t count) {
    double partial[64];
    int n = 0;
    for (int64_t i = 0; i < count; i++) {
        double sum = x[i];
        int kept = 0;
        if (!isfinite(sum)) return NAN;
        for (int j = 0; j < n; j++) {
            double a = sum, b = partial[j];
            if (fabs(a) < fabs(b)) {
                const double swap = a;
                a = b;
                b = swap;
            }
            const double high = a + b, low = b - (high - a);
            if (low != 0.0) partial[kept++] = low;
            sum = high;
        }
        partial[kept++] = sum;
        n = kept;
    }
    if (n == 0) return 0.0;
    double high = partial[--n], low = 0.0;
    while (n > 0) {
        const double a = high, b = partial[--n];
        high = a + b;
        low = b - (high - a);
        if (low != 0.0) break;
    }
    if (n > 0 && ((low < 0.0 && partial[n - 1] < 0.0) || (low > 0.0 && partial[n - 1] > 0.0))) {
        const double twice = low * 2.0, rounded = high + twice;
        if (twice == rounded - high) high = rounded;
    }
    return high;
}

/* The largest of `key` whose place is not taken yet; ties: the first. What is not a number comes last. */
static int64_t best_of(const double *key, const uint8_t *taken, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++) {
        if (taken[i]) continue;
        if (best < 0 || key[i] > key[best] || (isnan(key[best]) && !isnan(key[i]))) best = i;
    }
    return best < 0 ? 0 : best; /* one is always left */
}

/* Keeps the experts of the groups whose two largest keys have the largest sums; marks the others as taken. */
static void limit_groups(const pi_route *r, const double *key, uint8_t *taken) {
    const int64_t size = r->experts / r->groups;
    double sums[PI_MAX_EXPERTS];
    uint8_t kept[PI_MAX_EXPERTS] = {0};
    for (int64_t group = 0; group < r->groups; group++) {
        uint8_t used[PI_MAX_EXPERTS] = {0};
        const double *at = key + group * size;
        sums[group] = 0.0;
        for (int k = 0; k < 2 && k < size; k++) {
            const int64_t best = best_of(at, used, size);
            used[best] = 1;
            sums[group] += at[best];
        }
    }
    for (int64_t k = 0; k < r->groups_used; k++) kept[best_of(sums, kept, r->groups)] = 1;
    for (int64_t i = 0; i < r->experts; i++) taken[i] = !kept[i / size];
}

/* The weights of the experts `chosen` by softmax, where neither bias nor groups choose: of all, or of the chosen. */
static void weigh_softmax(const pi_route *r, const float *scores, const int32_t *chosen, double top, double *weight) {
    double power[PI_MAX_EXPERTS];
    const int64_t counted = r->normalized ? r->used : r->experts;
    for (int64_t i = 0; i < counted; i++) power[i] = exp((double)scores[r->normalized ? chosen[i] : i] - top);
    const double total = exact_sum(power, counted);
    for (int64_t k = 0; k < r->used; k++) weight[k] = power[r->normalized ? k : chosen[k]] / total;
}

/* What each expert weighs before it is chosen: p_i of a softmax, or sigmoids. */
static void probabilities(const pi_route *r, const float *scores, double *p) {
    if (r->kind == PI_ROUTE_SIGMOID) {
        for (int64_t i = 0; i < r->experts; i++) p[i] = isnan(scores[i]) ? NAN : sigmoid(scores[i]);
        return;
    }
    double top = -INFINITY;
    for (int64_t i = 0; i < r->experts; i++) top = isnan(scores[i]) || scores[i] > top ? scores[i] : top;
    for (int64_t i = 0; i < r->experts; i++) p[i] = exp((double)scores[i] - top);
    const double total = exact_sum(p, r->experts);
    for (int64_t i = 0; i < r->experts; i++) p[i] /= total;
}

static void normalize(double *weight, int64_t count) {
    double total = exact_sum(weight, count);
    if (total < 0x1p-14) total = 0x1p-14;
    for (int64_t k = 0; k < count; k++) weight[k] /= total;
}

static int ascending(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }

static void route_token(const pi_route *r, const float *scores, int32_t *result, float *out) {
    int32_t chosen[PI_MAX_EXPERTS]; /* not in the buffer: another thread may change that */
    double key[PI_MAX_EXPERTS], p[PI_MAX_EXPERTS], weight[PI_MAX_EXPERTS] = {0};
    uint8_t taken[PI_MAX_EXPERTS] = {0};
    const int plain = r->kind == PI_ROUTE_SOFTMAX && !r->bias && r->groups < 2;
    int spoilt = 0;
    if (!plain) probabilities(r, scores, p);
    for (int64_t i = 0; i < r->experts; i++) {
        spoilt |= isnan(scores[i]);
        key[i] = r->bias ? p[i] + r->bias[i] : scores[i];
    }
    if (r->groups > 1) limit_groups(r, key, taken);
    for (int64_t k = 0; k < r->used; k++) {
        chosen[k] = (int32_t)best_of(key, taken, r->experts);
        taken[chosen[k]] = 1;
    }
    const double top = spoilt ? NAN : scores[chosen[0]];
    qsort(chosen, (size_t)r->used, sizeof *chosen, ascending);
    if (plain) {
        weigh_softmax(r, scores, chosen, top, weight);
    } else {
        for (int64_t k = 0; k < r->used; k++) weight[k] = spoilt ? NAN : p[chosen[k]];
        if (r->normalized) normalize(weight, r->used);
    }
    for (int64_t k = 0; k < r->used; k++) out[k] = (float)(weight[k] * (double)r->scale);
    memcpy(result, chosen, sizeof *chosen * (size_t)r->used);
}

void pi_route_execute(const pi_op *op, const pi_run *run, const pi_worker *worker) {
    const pi_route *r = &op->u.route;
    const pi_part p = pi_part_of(op, run, worker);
    for (int64_t t = p.token0; t < p.token1; t++) {
        route_token(r, r->scores + t * r->experts, r->chosen + t * r->used, r->weights + t * r->used);
        if (r->shared_score) r->shared_weight[t] = (float)sigmoid(r->shared_score[t]);
    }
}
