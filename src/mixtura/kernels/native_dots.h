/* Products for the few rows that an expert has in a decoding step: the weight comes from memory once, as fast as memory
   allows, and every number of the output is a dot product of its own, summed in the same order whatever other rows
   there are and whichever thread computes it.

   out (n, m) = x (n, k) @ weight (m, k).T, all by rows. */

#include "native_vectors.h"

enum {
    STRIP_OUTPUTS = 4, /* rows of the weight at once */
#ifdef __AVX512F__
    MOST_TOGETHER = 6, /* rows of x at once: 24 sums, of 32 registers */
#else
    MOST_TOGETHER = 3, /* 12 sums, of 16 registers */
#endif
    AHEAD = 32768 /* bytes from what is multiplied to what is fetched: measured from 1 to 32 KB, the more the better */
};

typedef struct {
    int64_t k, x_row, out_row; /* numbers from a row of x, and of out, to the next */
} dots_t;

static inline quartet_t in_four_parts(vec_t v) {
    oct_t halves[LANES / 8];
    memcpy(halves, &v, sizeof(v));
    oct_t eight = halves[0];
    if (LANES == 16) eight += halves[LANES / 8 - 1];
    quartet_t quarters[2];
    memcpy(quarters, &eight, sizeof(eight));
    return quarters[0] + quarters[1];
}

/* Sums of neighbours: those of a, then those of b. */
static inline quartet_t in_pairs(quartet_t a, quartet_t b) {
    return MIX(four_places_t, a, b, 0, 2, 4, 6) + MIX(four_places_t, a, b, 1, 3, 5, 7);
}

/* The compiler would read an operand again for each product with it, and the loads would then take longer than the
   products. */
#ifdef __x86_64__
#define KEEP_IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define KEEP_IN_REGISTER(vector) (void)(vector)
#endif

/* I rows of the weight and J rows of x. The weight is read as I streams at once, each so short that the processor does
   not learn to fetch them in time; so memory is fetched in its own order from `next` on, `fetch` bytes further after
   each vector. Half the speed from memory is owed to that. Prefetching never faults, so nothing looks where the weight
   ends. */
#define DOTS(I, J)                                                                                                   \
    static inline void dots_##I##_##J(const dots_t *d, const float *x, const float *weight, float *out,              \
                                      const char *next, int64_t fetch) {                                             \
        const int64_t k = d->k, x_row = d->x_row, out_row = d->out_row;                                              \
        vec_t sum[I][J];                                                                                             \
        for (int i = 0; i < I; i++)                                                                                  \
            for (int j = 0; j < J; j++) sum[i][j] = (vec_t){0};                                                      \
        int64_t p = 0;                                                                                               \
        for (; p + LANES <= k; p += LANES) {                                                                         \
            vec_t right[J];                                                                                          \
            for (int j = 0; j < J; j++) {                                                                            \
                right[j] = *(const vec_t *)(x + j * x_row + p);                                                      \
                KEEP_IN_REGISTER(right[j]);                                                                          \
            }                                                                                                        \
            for (int i = 0; i < I; i++, next += fetch) {                                                             \
                vec_t left = *(const vec_t *)(weight + i * k + p);                                                   \
                KEEP_IN_REGISTER(left);                                                                              \
                __builtin_prefetch(next, 0, 2);                                                                      \
                for (int j = 0; j < J; j++) sum[i][j] += left * right[j];                                            \
            }                                                                                                        \
        }                                                                                                            \
        for (int j = 0; j < J; j++) {                                                                                \
            float sums[STRIP_OUTPUTS];                                                                               \
            *(quartet_t *)sums = in_pairs(                                                                           \
                in_pairs(in_four_parts(sum[0][j]), in_four_parts(sum[1 % I][j])),                                    \
                in_pairs(in_four_parts(sum[2 % I][j]), in_four_parts(sum[3 % I][j])));                               \
            for (int i = 0; i < I; i++) {                                                                            \
                for (int64_t q = p; q < k; q++) sums[i] += weight[i * k + q] * x[j * x_row + q];                     \
                out[j * out_row + i] = sums[i];                                                                      \
            }                                                                                                        \
        }                                                                                                            \
    }
#define PIECE(I, J) \
    case J: dots_##I##_##J(d, x + j * d->x_row, weight, out + j * d->out_row, next, fetch); break;
#ifdef __AVX512F__
#define EACH(DO, I) DO(I, 1) DO(I, 2) DO(I, 3) DO(I, 4) DO(I, 5) DO(I, 6)
#else
#define EACH(DO, I) DO(I, 1) DO(I, 2) DO(I, 3)
#endif
/* A strip of I outputs and all rows of x, in pieces of about one size, each of which fetches its part of what comes. */
#define OUTPUTS(I)                                                                                                   \
    EACH(DOTS, I)                                                                                                    \
    static void outputs_##I(const dots_t *d, int64_t n, const float *x, const float *weight, float *out) {           \
        const int64_t pieces = (n + MOST_TOGETHER - 1) / MOST_TOGETHER, fetch = 4 * LANES / pieces;                  \
        const char *next = (const char *)weight + AHEAD;                                                             \
        for (int64_t piece = 0, j = 0; piece < pieces; piece++, next += d->k / LANES * I * fetch) {                  \
            const int64_t rows = (n - j + pieces - piece - 1) / (pieces - piece);                                    \
            switch (rows) { EACH(PIECE, I) }                                                                         \
            j += rows;                                                                                               \
        }                                                                                                            \
    }
OUTPUTS(4)
OUTPUTS(1)

static void few_rows_product(const dots_t *d, int64_t m, int64_t n, const float *x, const float *weight, float *out) {
    int64_t i = 0;
    for (; i + STRIP_OUTPUTS <= m; i += STRIP_OUTPUTS) outputs_4(d, n, x, weight + i * d->k, out + i);
    for (; i < m; i++) outputs_1(d, n, x, weight + i * d->k, out + i);
}
