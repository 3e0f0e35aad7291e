/* Choosing and sorting by expert. All arrays are contiguous, T tokens, E experts, K choices of a token. */

#include <float.h>
#include <math.h>
#include <string.h>

#include "native_common.h"
#include "native_threads.h"

enum { BLOCK = 16 };

static float largest(const float *score) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < BLOCK; i++) most = score[i] > most ? score[i] : most;
    return most;
}

/* choice (T, K): the K largest of each row of scores (T, E), the largest first and of equals the one named first.
   `scratch` has room for 17 / 16 of E numbers, rounded up to 17, for every thread. Blocks of scores and their largest
   are looked through in turn, which has no branches to guess wrong. What is no number counts as the least that is. */
void mixtura_top_k(
    int64_t threads, int64_t tokens, int64_t experts, int64_t choices, const float *scores, int64_t *choice,
    float *scratch) {
    const int64_t blocks = (experts + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const float *score = scores + t * experts;
        float *own = scratch + thread_number() * blocks * (BLOCK + 1), *most = own + blocks * BLOCK;
        for (int64_t e = 0; e < experts; e++) own[e] = score[e] > -FLT_MAX ? score[e] : -FLT_MAX;
        for (int64_t e = experts; e < blocks * BLOCK; e++) own[e] = -INFINITY;
        for (int64_t b = 0; b < blocks; b++) most[b] = largest(own + b * BLOCK);
        for (int64_t k = 0; k < choices; k++) {
            int64_t b = 0, i = 0;
            for (int64_t other = 1; other < blocks; other++) b = most[other] > most[b] ? other : b;
            while (own[b * BLOCK + i] != most[b]) i++;
            choice[t * choices + k] = b * BLOCK + i;
            own[b * BLOCK + i] = -INFINITY; /* taken, below all that are left */
            most[b] = largest(own + b * BLOCK);
        }
    }
}

/* order (R,): the stable order of the rows by expert, and counts (E,); `next` has room for E numbers. Returns 1,
   with nothing written, where an expert's number is out of range. */
int mixtura_sort_by_expert(
    int64_t rows, int64_t experts, const int64_t *expert, int64_t *order, int64_t *counts, int64_t *next) {
    if (any_outside(expert, rows, experts)) return 1;
    memset(counts, 0, experts * sizeof(int64_t));
    for (int64_t r = 0; r < rows; r++) counts[expert[r]]++;
    for (int64_t e = 0, start = 0; e < experts; start += counts[e], e++) next[e] = start;
    for (int64_t r = 0; r < rows; r++) order[next[expert[r]]++] = r;
    return 0;
}
