/* What the files in C share: BLAS's product, which is torch's own, and the check of indices. */

#include <stddef.h>
#include <stdint.h>

/* Fortran's: matrices by columns, everything by address. */
typedef void (*sgemm_t)(
    const char *, const char *, const int *, const int *, const int *, const float *, const float *, const int *,
    const float *, const int *, const float *, float *, const int *);

/* out (m, n) = a (m, k) @ b (k, n) + beta * out, all by rows; with 'T' the operand lies in memory as its transpose.
   By columns that is the transposed product, out.T = b.T @ a.T, with nothing to move. */
static void product(
    sgemm_t sgemm, char a_is, char b_is, int m, int n, int k, const float *a, const float *b, float beta, float *out) {
    const float one = 1.0f;
    const int a_columns = a_is == 'T' ? m : k, b_columns = b_is == 'T' ? k : n;
    sgemm(&b_is, &a_is, &n, &m, &k, &one, b, &b_columns, a, &a_columns, &beta, out, &n);
}

/* Whether an index is not in [0, limit): asked before it is followed, since C would read or write beyond the array. */
static int any_outside(const int64_t *index, int64_t count, int64_t limit) {
    int outside = 0;
#pragma omp simd reduction(| : outside)
    for (int64_t i = 0; i < count; i++) outside |= (uint64_t)index[i] >= (uint64_t)limit; /* negative ones are huge */
    return outside;
}
