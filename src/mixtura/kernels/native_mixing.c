/* Mixing and spreading, group by group, with a group's mixtures side by side in cache. All arrays are float32 and
   contiguous; native.py calls it. */

#include <string.h>

#include "native_common.h"
#include "native_threads.h"

/* Tokens lie by group, (N, G, D), and mixtures by expert, (E, N*C, D): slot s = e*C + c of group n is row n*C + c of
   expert e. Weights are (N, G, S) with S = E*C. */
typedef struct {
    sgemm_t sgemm;
    int64_t threads, groups, group_size, experts, mixtures, hidden;
    float *scratch; /* threads * S * D */
} mixing_t;

static float *mixture_row(const mixing_t *m, const float *z, int64_t n, int64_t s) {
    const int64_t e = s / m->mixtures, c = s % m->mixtures;
    return (float *)z + ((e * m->groups + n) * m->mixtures + c) * m->hidden;
}

/* Copies a group's mixtures between their places and one block, (S, D). */
static void move(const mixing_t *m, float *z, int64_t n, float *block, int into_block) {
    const int64_t D = m->hidden, S = m->experts * m->mixtures;
    for (int64_t s = 0; s < S; s++) {
        float *row = mixture_row(m, z, n, s);
        if (into_block) memcpy(block + s * D, row, D * sizeof(float));
        else memcpy(row, block + s * D, D * sizeof(float));
    }
}

/* z = weight.T @ tokens, for every group; with `inner` also inner = tokens @ other.T, (N, G, S), `other` lying as z. */
void mixtura_mix(
    const mixing_t *m, const float *weight, const float *tokens, float *z, const float *other, float *inner) {
    const int64_t G = m->group_size, D = m->hidden, S = m->experts * m->mixtures;
#pragma omp parallel for num_threads(m->threads) if (m->threads > 1)
    for (int64_t n = 0; n < m->groups; n++) {
        float *block = m->scratch + thread_number() * S * D;
        if (inner) {
            move(m, (float *)other, n, block, 1);
            product(m->sgemm, 'N', 'T', G, S, D, tokens + n * G * D, block, 0.0f, inner + n * G * S);
        }
        product(m->sgemm, 'T', 'N', S, D, G, weight + n * G * S, tokens + n * G * D, 0.0f, block);
        move(m, z, n, block, 0);
    }
}

/* tokens = weight @ z, for every group; with `inner` also inner = other @ z.T, (N, G, S), `other` lying as tokens. */
void mixtura_spread(
    const mixing_t *m, const float *weight, const float *z, float *tokens, const float *other, float *inner) {
    const int64_t G = m->group_size, D = m->hidden, S = m->experts * m->mixtures;
#pragma omp parallel for num_threads(m->threads) if (m->threads > 1)
    for (int64_t n = 0; n < m->groups; n++) {
        float *block = m->scratch + thread_number() * S * D;
        move(m, (float *)z, n, block, 1);
        product(m->sgemm, 'N', 'N', G, D, S, weight + n * G * S, block, 0.0f, tokens + n * G * D);
        if (inner) product(m->sgemm, 'N', 'T', G, S, D, other + n * G * D, block, 0.0f, inner + n * G * S);
    }
}
