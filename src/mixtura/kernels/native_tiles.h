/* Products for experts that get few rows, in which a weight is read once and BLAS would first lay it out anew. Here the
   weight is read where it lies, a number at a time, and the rows of the expert lie side by side as the columns of a
   panel, a vector at a time; the next piece of the weight is fetched while this one is multiplied. With 32 rows an
   expert that is 1.7 times the speed of sgemm, with 8 rows twice.

   out (m, n) = a (m, k) @ b (k, n) [+ out], where a(i, p) = a[i * a_row + p * a_step], and b and out lie by rows. */

#include "native_vectors.h"

typedef struct {
    int64_t m, n, k, a_row, a_step, b_row, out_row; /* n is at least LANES */
    const float *a, *b;
    float *out;
    int add;           /* to what is in out: a product over a long k is made of several */
    const float *next; /* what will be read or written next: fetched while the tiles are computed, */
    int64_t fetch;     /* that many bytes further at every step of a tile */
} tiles_t;

/* I rows and J vectors of out, from (i, j) on, kept in registers over all k steps. LAST: one vector that ends with the
   last column, so it overlaps the vector before it; `valid` are the lanes that no other tile computes. The other lanes
   keep what is in out: they are left out by selecting bits when the sums are stored. Multiplying their operand by zero
   would not do, since zero times an infinite number is NaN and would spread to columns that never met that number. */
#define TILE(I, J, LAST)                                                                                             \
    static void tile_##I##_##J##_##LAST(                                                                             \
        const tiles_t *t, int64_t i0, int64_t j0, const char *next, mask_t valid) {                                  \
        const int64_t k = t->k, a_row = t->a_row, a_step = t->a_step, b_row = t->b_row, out_row = t->out_row;        \
        const int64_t fetch = t->fetch;                                                                              \
        const float *a = t->a + i0 * a_row, *b = t->b + j0;                                                          \
        float *out = t->out + i0 * out_row + j0;                                                                     \
        vec_t sum[I][J];                                                                                             \
        for (int i = 0; i < I; i++)                                                                                  \
            for (int j = 0; j < J; j++) {                                                                            \
                sum[i][j] = t->add ? *(const vec_t *)(out + i * out_row + j * LANES) : (vec_t){0};                   \
            }                                                                                                        \
        for (int64_t p = 0; p < k; p++, next += fetch) {                                                             \
            vec_t right[J];                                                                                          \
            for (int j = 0; j < J; j++) right[j] = *(const vec_t *)(b + p * b_row + j * LANES);                      \
            __builtin_prefetch(next);                                                                                \
            for (int i = 0; i < I; i++) {                                                                            \
                const float left = a[i * a_row + p * a_step];                                                        \
                for (int j = 0; j < J; j++) sum[i][j] += left * right[j];                                            \
            }                                                                                                        \
        }                                                                                                            \
        for (int i = 0; i < I; i++)                                                                                  \
            for (int j = 0; j < J; j++) {                                                                            \
                vec_t *to = (vec_t *)(out + i * out_row + j * LANES);                                                \
                *to = LAST ? (vec_t)(((mask_t)sum[i][j] & valid) | ((mask_t)*to & ~valid)) : sum[i][j];              \
            }                                                                                                        \
    }
/* I rows and all columns. */
#define STRIP(I)                                                                                                     \
    TILE(I, 2, 0) TILE(I, 1, 0) TILE(I, 1, 1)                                                                        \
    static void strip_##I(const tiles_t *t, int64_t i, const char *next, mask_t valid) {                             \
        const int64_t further = t->k * t->fetch;                                                                     \
        int64_t j = 0;                                                                                               \
        for (; j + 2 * LANES <= t->n; j += 2 * LANES, next += further) tile_##I##_2_0(t, i, j, next, valid);         \
        for (; j + LANES <= t->n; j += LANES, next += further) tile_##I##_1_0(t, i, j, next, valid);                 \
        if (j < t->n) tile_##I##_1_1(t, i, t->n - LANES, next, valid);                                               \
    }
/* Six rows of two vectors are twelve sums; with two vectors read and one number repeated that fills fifteen of the
   sixteen registers of AVX2. More sums would spill to memory, fewer would leave the multipliers waiting for the
   loads. */
enum { STRIP_ROWS = 6 };
STRIP(6)
STRIP(4)
STRIP(2)
STRIP(1)

/* All of out, strip by strip. Each thread has whole strips, so the lanes that overlap within a row are one thread's. */
static void tiles(const tiles_t *t, int64_t threads) {
    mask_t valid;
    for (int i = 0; i < LANES; i++) valid[i] = i >= LANES - t->n % LANES ? -1 : 0;
    const int64_t strips = (t->m + STRIP_ROWS - 1) / STRIP_ROWS;
    const int64_t further = (t->n + 2 * LANES - 1) / (2 * LANES) * t->k * t->fetch;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t strip = 0; strip < strips; strip++) {
        int64_t i = strip * STRIP_ROWS;
        const char *next = (const char *)t->next + strip * further;
        if (i + STRIP_ROWS <= t->m) strip_6(t, i, next, valid);
        else {
            if (i + 4 <= t->m) strip_4(t, i, next, valid), i += 4;
            if (i + 2 <= t->m) strip_2(t, i, next, valid), i += 2;
            if (i < t->m) strip_1(t, i, next, valid);
        }
    }
}

/* Bytes to fetch at each step so that one pass over the tiles of `columns` columns fetches what one strip reads. */
static int64_t fetch_bytes(int64_t columns) { return STRIP_ROWS * 2 * LANES * (int64_t)sizeof(float) / columns; }

/* out (m, columns) = weight (m, k) @ panel (k, columns). */
static void weight_by_panel(
    int64_t threads, int64_t m, int64_t columns, int64_t k, const float *weight, const float *panel, float *out) {
    const tiles_t t = {m, columns, k, k, 1, columns, columns, weight, panel, out, 0, weight + STRIP_ROWS * k,
                       fetch_bytes(columns)};
    tiles(&t, threads);
}

/* out (m, columns) = weight (k, m).T @ panel (k, columns), so many rows of the weight at a time as stay in cache. */
static void turned_weight_by_panel(
    int64_t threads, int64_t m, int64_t columns, int64_t k, const float *weight, const float *panel, float *out) {
    const int64_t step = 128;
    for (int64_t p = 0; p < k; p += step) {
        const int64_t rows = k - p < step ? k - p : step;
        const tiles_t t = {m, columns, rows, 1, m, columns, columns, weight + p * m, panel + p * columns, out, p > 0,
                           weight + (p + rows) * m, fetch_bytes(columns)};
        tiles(&t, threads);
    }
}

/* grad (m, n) = panel (m, columns) @ rows (columns, n), over the first k columns. */
static void gradient_of_weight(
    int64_t threads, int64_t m, int64_t n, int64_t k, const float *panel, int64_t columns, const float *rows,
    int64_t row, float *grad) {
    const tiles_t t = {m, n, k, columns, 1, row, n, panel, rows, grad, 0, grad + STRIP_ROWS * n, fetch_bytes(k)};
    tiles(&t, threads);
}

/* Squares are turned around in registers: one number at a time, a row would be read in order and written with a stride,
   and each write would touch another cache line. */
enum { TURNED = 8 };

/* Three rounds of exchanges, each between registers twice as far apart: pairs of rows, pairs of those, halves.
   to (8, to_row), by rows = the columns from `first` on of eight rows. */
static inline void turn(const float *const rows[TURNED], int64_t first, float *to, int64_t to_row) {
    oct_t r[TURNED], pairs[TURNED], fours[TURNED];
    for (int i = 0; i < TURNED; i++) r[i] = *(const oct_t *)(rows[i] + first);
    for (int i = 0; i < TURNED; i += 2) {
        pairs[i] = MIX(eight_places_t, r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = MIX(eight_places_t, r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < TURNED; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = MIX(eight_places_t, pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = MIX(eight_places_t, pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        *(oct_t *)(to + i * to_row) = MIX(eight_places_t, fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(oct_t *)(to + (i + 4) * to_row) = MIX(eight_places_t, fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
