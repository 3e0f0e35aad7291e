/* Choosing and sorting by expert. All arrays are contiguous, T tokens, E experts, K choices of a token. */

#include <stdint.h>
#include <string.h>

/* choice (T, K): the K largest of each row of scores (T, E), the largest first and of equals the one named first. */
void mixtura_top_k(
    int64_t threads, int64_t tokens, int64_t experts, int64_t choices, const float *scores, int64_t *choice) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const float *score = scores + t * experts;
        int64_t *best = choice + t * choices, found = 0;
        for (int64_t e = 0; e < experts; e++) {
            const float own = score[e];
            if (found == choices && !(own > score[best[found - 1]])) continue;
            int64_t place = found < choices ? found++ : choices - 1;
            for (; place > 0 && own > score[best[place - 1]]; place--) best[place] = best[place - 1];
            best[place] = e;
        }
    }
}

/* order (R,): the stable order of the rows by expert, and counts (E,); `next` has room for E numbers. */
void mixtura_sort_by_expert(
    int64_t rows, int64_t experts, const int64_t *expert, int64_t *order, int64_t *counts, int64_t *next) {
    memset(counts, 0, experts * sizeof(int64_t));
    for (int64_t r = 0; r < rows; r++) counts[expert[r]]++;
    for (int64_t e = 0, start = 0; e < experts; start += counts[e], e++) next[e] = start;
    for (int64_t r = 0; r < rows; r++) order[next[expert[r]]++] = r;
}
