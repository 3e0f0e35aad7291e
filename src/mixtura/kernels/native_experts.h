/* The experts of a call, and their activations.

   Letters: E experts, D hidden, F expert width, H = 2F when gated (gate columns first) else F, R rows sorted by expert,
   T tokens. */

#include <math.h>

#include "native_common.h"

enum { RELU = 0, SILU = 1 };

/* exp(x) to about one unit in the last place: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN. */
static inline float exp_f(float x) {
    /* Written as selections, which vectorise, and so that NaN, for which both comparisons fail, passes through. */
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    union { float f; uint32_t i; } shifted, scale;
    shifted.f = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
    const float n = shifted.f - 12582912.0f;
    /* ln 2 in two parts, of which the first has few bits: n times it is exact, and the difference loses no digits. */
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    /* The polynomial of Cephes' expf (Moshier), by Horner's rule. */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    scale.i = (shifted.i << 23) + 0x3f800000u; /* the low bits of `shifted` are n */
    return p * scale.f;
}

static inline float sigmoid_f(float x) {
    const float s = 1.0f / (1.0f + exp_f(-x));
    return x < -88.0f ? 0.0f : s; /* exp_f ends there, and x times what it ends with need not be small */
}

/* A copy for every kind of expert. Left to choose, GCC makes one function of all kinds where vectors have 512 bits, whose
   branches keep the loops scalar: they took six times as long. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* h = act(gate) * up * weight, for n numbers of one row, which share a weight, or, with `per_column`, of n rows. Called
   with constants for `silu`, `gated` and `per_column`, so that each case is its own loop. */
ALWAYS_INLINE void activate_run(
    int silu, int gated, int per_column, int64_t n, const float *gate, const float *up, const float *weight, float *h) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float act = silu ? gate[i] * sigmoid_f(gate[i]) : (gate[i] < 0.0f ? 0.0f : gate[i]);
        h[i] = act * (gated ? up[i] : 1.0f) * weight[per_column ? i : 0];
    }
}

/* Given grad = grad_y @ down: h as above in `h` and the gradients of gate and up; that of a weight, <grad_y, y> =
   <grad, h / weight>, is added to. */
ALWAYS_INLINE void activate_run_backward(
    int silu, int gated, int per_column, int64_t n, const float *gate, const float *up, const float *weight,
    const float *grad, float *h, float *grad_gate, float *grad_up, float *grad_weight) {
    /* y = h @ down.T, so <grad_y, y> is <grad_y @ down, h>: the weight's gradient is found here, where both are at
       hand, and the output of the expert need not be kept. */
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        const float s = silu ? sigmoid_f(gate[i]) : 1.0f;
        const float act = silu ? gate[i] * s : (gate[i] < 0.0f ? 0.0f : gate[i]);
        const float slope = silu ? s * (1.0f + gate[i] * (1.0f - s)) : 1.0f;
        const float other = gated ? up[i] : 1.0f, w = weight[per_column ? i : 0], weighted = grad[i] * w;
        const float inner = grad[i] * act * other;
        if (per_column) grad_weight[i] += inner;
        else sum += inner;
        h[i] = act * other * w;
        /* ReLU stops a gradient by clearing its bits: times a slope of zero an infinite one would be NaN, and written as
           a selection the compiler makes a branch of it, which keeps the loop from becoming vectors. */
        union { float f; uint32_t i; } through = {weighted * other * slope};
        through.i &= -(uint32_t)(silu || !(gate[i] <= 0.0f));
        grad_gate[i] = through.f;
        if (gated) grad_up[i] = weighted * act;
    }
    if (!per_column) *grad_weight += sum;
}

/* One loop for each kind of expert: with constants in place of `silu` and `gated` the compiler drops the branches, and
   the loop becomes vectors. A branch on a variable inside the loop would keep it scalar. */
#define EACH_KIND(e, RUN, PER_COLUMN, ...)                             \
    switch (2 * ((e)->activation == SILU) + ((e)->gated != 0)) {       \
        case 3: RUN(1, 1, PER_COLUMN, __VA_ARGS__); break;             \
        case 2: RUN(1, 0, PER_COLUMN, __VA_ARGS__); break;             \
        case 1: RUN(0, 1, PER_COLUMN, __VA_ARGS__); break;             \
        default: RUN(0, 0, PER_COLUMN, __VA_ARGS__);                   \
    }

typedef struct {
    sgemm_t sgemm;
    int64_t threads, block, experts, hidden, width, gated, activation, tokens;
    const int64_t *counts, *token; /* (E,); (R,) or NULL */
    const float *weight;           /* (R,), or NULL where token is */
    const float *x, *up, *down;    /* (T, D), (E, H, D), (E, D, F) */
    float *scratch;                /* block * (3D + 2F + H), for every thread */
    float *others;                 /* (threads - 1, T, D) where threads may add to the same tokens, or NULL */
} experts_t;

static const float ONE = 1.0f;

static void activate(const experts_t *e, int64_t rows, const float *u, const float *weight, float *h) {
    const int64_t F = e->width, H = e->gated ? 2 * F : F;
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *w = weight ? weight + r : &ONE, *gate = u + r * H;
        EACH_KIND(e, activate_run, 0, F, gate, gate + F, w, h + r * F)
    }
}
