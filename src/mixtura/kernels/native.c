/* Experts on the CPU, a block of rows at a time: gathered, multiplied, activated and added back while in cache.

   Matrix products are torch's own (BLAS's sgemm, handed in as a pointer); this file fuses what lies between them.
   native.py compiles and calls it. All arrays are float32 and contiguous.

   Letters: E experts, D hidden, F expert width, H = 2F when gated (gate columns first) else F, R rows sorted by expert.
   token[r] is the row of x and out that row r reads and adds to. Without `token`, rows are where they are and weights
   are 1. An expert has a token at most once, so the rows of a block never add to the same place. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
static int thread_number(void) { return omp_get_thread_num(); }
#else
static int thread_number(void) { return 0; }
#endif

enum { RELU = 0, SILU = 1 };

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

/* exp(x) to about one unit in the last place: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN. */
static inline float exp_f(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    union { float f; uint32_t i; } shifted, scale;
    shifted.f = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
    const float n = shifted.f - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
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

/* One row: h = act(gate) * up * weight. Called with constants for `silu` and `gated`, so that each case is its own loop. */
static inline void activate_row(int silu, int gated, int64_t F, const float *u, float weight, float *h) {
#pragma omp simd
    for (int64_t i = 0; i < F; i++) {
        const float act = silu ? u[i] * sigmoid_f(u[i]) : (u[i] < 0.0f ? 0.0f : u[i]);
        h[i] = act * (gated ? u[F + i] : 1.0f) * weight;
    }
}

/* One row, given grad = grad_y @ down: h as above in `h`, the gradient of u in `grad_u`; returns that of the weight,
   <grad_y, y> = <grad, h / weight>. */
static inline float activate_row_backward(
    int silu, int gated, int64_t F, const float *u, float weight, const float *grad, float *h, float *grad_u) {
    float grad_weight = 0.0f;
#pragma omp simd reduction(+ : grad_weight)
    for (int64_t i = 0; i < F; i++) {
        const float s = silu ? sigmoid_f(u[i]) : (u[i] > 0.0f ? 1.0f : 0.0f);
        const float act = silu ? u[i] * s : (u[i] < 0.0f ? 0.0f : u[i]);
        const float slope = silu ? s * (1.0f + u[i] * (1.0f - s)) : s;
        const float up = gated ? u[F + i] : 1.0f;
        const float weighted = grad[i] * weight;
        grad_weight += grad[i] * act * up;
        h[i] = act * up * weight;
        grad_u[i] = weighted * up * slope;
        if (gated) grad_u[F + i] = weighted * act;
    }
    return grad_weight;
}

typedef struct {
    sgemm_t sgemm;
    int64_t threads, block, experts, hidden, width, gated, activation;
    const int64_t *counts, *token; /* (E,); (R,) or NULL */
    const float *weight;           /* (R,), or NULL where token is */
    const float *x, *up, *down;    /* (T, D), (E, H, D), (E, D, F) */
    float *scratch;                /* block * (3D + 2F + H) */
} experts_t;

static void activate(const experts_t *e, int64_t rows, const float *u, const float *weight, float *h) {
    const int64_t F = e->width, H = e->gated ? 2 * F : F;
    const int kind = 2 * (e->activation == SILU) + (e->gated != 0);
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float w = weight ? weight[r] : 1.0f;
        if (kind == 3) activate_row(1, 1, F, u + r * H, w, h + r * F);
        else if (kind == 2) activate_row(1, 0, F, u + r * H, w, h + r * F);
        else if (kind == 1) activate_row(0, 1, F, u + r * H, w, h + r * F);
        else activate_row(0, 0, F, u + r * H, w, h + r * F);
    }
}

static void activate_backward(
    const experts_t *e, int64_t rows, const float *u, const float *weight, const float *grad, float *h, float *grad_u,
    float *grad_weight) {
    const int64_t F = e->width, H = e->gated ? 2 * F : F;
    const int kind = 2 * (e->activation == SILU) + (e->gated != 0);
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float w = weight ? weight[r] : 1.0f;
        const float *ur = u + r * H, *gr = grad + r * F;
        float *hr = h + r * F, *gur = grad_u + r * H, g;
        if (kind == 3) g = activate_row_backward(1, 1, F, ur, w, gr, hr, gur);
        else if (kind == 2) g = activate_row_backward(1, 0, F, ur, w, gr, hr, gur);
        else if (kind == 1) g = activate_row_backward(0, 1, F, ur, w, gr, hr, gur);
        else g = activate_row_backward(0, 0, F, ur, w, gr, hr, gur);
        if (grad_weight) grad_weight[r] = g;
    }
}

/* Rows of a block side by side: copies of the tokens' rows, or the rows where they are. */
static const float *rows_of(const experts_t *e, const float *from, int64_t start, int64_t rows, float *copy) {
    const int64_t D = e->hidden;
    if (!e->token) return from + start * D;
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t r = 0; r < rows; r++) memcpy(copy + r * D, from + e->token[start + r] * D, D * sizeof(float));
    return copy;
}

static void add_back(const experts_t *e, const float *from, int64_t start, int64_t rows, float *to) {
    const int64_t D = e->hidden;
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        float *o = to + e->token[start + r] * D;
        const float *y = from + r * D;
#pragma omp simd
        for (int64_t i = 0; i < D; i++) o[i] += y[i];
    }
}

/* out: (T, D) of zeros with `token`, else (R, D); u: (R, H), kept for the backward pass. */
void mixtura_experts_forward(const experts_t *e, float *u, float *out) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F;
    float *x_copy = e->scratch, *y = x_copy + e->block * D, *h = y + e->block * D;
    int64_t start = 0;
    for (int64_t n = 0; n < e->experts; n++) {
        const float *up = e->up + n * H * D, *down = e->down + n * D * F;
        const int64_t end = start + e->counts[n];
        for (int64_t rows; start < end; start += rows) {
            rows = end - start < e->block ? end - start : e->block;
            const float *x = rows_of(e, e->x, start, rows, x_copy);
            float *block_u = u + start * H, *block_y = e->token ? y : out + start * D;
            product(e->sgemm, 'N', 'T', rows, H, D, x, up, 0.0f, block_u);
            activate(e, rows, block_u, e->weight ? e->weight + start : NULL, h);
            product(e->sgemm, 'N', 'T', rows, D, F, h, down, 0.0f, block_y);
            if (e->token) add_back(e, y, start, rows, out);
        }
    }
}

/* grad_x: (T, D) of zeros with `token`, else (R, D); grad_up and grad_down of zeros; grad_weight: (R,) or NULL. */
void mixtura_experts_backward(
    const experts_t *e, const float *u, const float *grad, float *grad_x, float *grad_weight, float *grad_up,
    float *grad_down) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F;
    float *x_copy = e->scratch, *grad_copy = x_copy + e->block * D, *grad_rows = grad_copy + e->block * D;
    float *grad_h = grad_rows + e->block * D, *h = grad_h + e->block * F, *grad_u = h + e->block * F;
    int64_t start = 0;
    for (int64_t n = 0; n < e->experts; n++) {
        const float *up = e->up + n * H * D, *down = e->down + n * D * F;
        const int64_t end = start + e->counts[n];
        float beta = 0.0f; /* the first block of an expert writes its weights' gradients, the others add to them */
        if (start == end) {
            memset(grad_up + n * H * D, 0, H * D * sizeof(float));
            memset(grad_down + n * D * F, 0, D * F * sizeof(float));
        }
        for (int64_t rows; start < end; start += rows, beta = 1.0f) {
            rows = end - start < e->block ? end - start : e->block;
            const float *gy = rows_of(e, grad, start, rows, grad_copy);
            float *gx = e->token ? grad_rows : grad_x + start * D;
            product(e->sgemm, 'N', 'N', rows, F, D, gy, down, 0.0f, grad_h);
            activate_backward(e, rows, u + start * H, e->weight ? e->weight + start : NULL, grad_h, h, grad_u,
                              grad_weight ? grad_weight + start : NULL);
            product(e->sgemm, 'T', 'N', D, F, rows, gy, h, beta, grad_down + n * D * F);
            const float *x = rows_of(e, e->x, start, rows, x_copy);
            product(e->sgemm, 'T', 'N', H, D, rows, grad_u, x, beta, grad_up + n * H * D);
            product(e->sgemm, 'N', 'N', rows, D, H, grad_u, up, 0.0f, gx);
            if (e->token) add_back(e, grad_rows, start, rows, grad_x);
        }
    }
}

/* Each token's choices, as they come: T tokens, K choices of each, row r = t*K + k, S mixtures. */
typedef struct {
    int64_t tokens, choices, mixtures, per_expert;
    int64_t shared;                /* all choices of a token read its row of x (T, D); else x is (T, K, D) */
    float temperature, same_mass;
    int64_t *expert, *mixture;     /* (T, K): which expert, and which row of `mean` and `rest` */
    const float *scale;            /* (T, K), or NULL, which is 1 */
    float *weight;                 /* (T, K) */
    const float *logits;           /* (T, S) */
    const float *log_mass;         /* (S,), or NULL where all mixtures have `same_mass` */
    const float *mean, *rest;      /* (S, D), or NULL, which is 0 */
    float *u, *all;                /* room for block * H and S numbers */
    int64_t *rank;                 /* room for T*K + E numbers */
    float *out;                    /* (T, D), added to */
} choices_t;

/* out += the sum over the choices of a token of weight * f_expert(scale * x + (1 - scale) * mean). Inference only.
   A token may choose an expert more than once. e->weight, e->counts and e->token are not looked at. */
void mixtura_chosen(const experts_t *e, const choices_t *c) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F, R = c->tokens * c->choices;
    float *x = e->scratch, *y = x + e->block * D, *h = y + e->block * D, *weight = h + e->block * F;
    int64_t *rank = c->rank, *ends = rank + R, start = 0;
    memset(ends, 0, e->experts * sizeof(int64_t));
    for (int64_t r = 0; r < R; r++) ends[c->expert[r]]++;
    for (int64_t n = 0, before = 0; n < e->experts; n++) {
        const int64_t count = ends[n];
        ends[n] = before; /* where its rows begin; the next loop moves it to where they end */
        before += count;
    }
    for (int64_t r = 0; r < R; r++) rank[ends[c->expert[r]]++] = r;
    for (int64_t n = 0; n < e->experts; n++) {
        const float *up = e->up + n * H * D, *down = e->down + n * D * F;
        for (int64_t rows; start < ends[n]; start += rows) {
            rows = ends[n] - start < e->block ? ends[n] - start : e->block;
            for (int64_t r = 0; r < rows; r++) {
                const int64_t row = rank[start + r];
                const float *from = e->x + (c->shared ? row / c->choices : row) * D, s = c->scale ? c->scale[row] : 1.0f;
                const float *mean = c->mean ? c->mean + c->mixture[row] * D : NULL;
#pragma omp simd
                for (int64_t i = 0; i < D; i++) x[r * D + i] = mean ? mean[i] + s * (from[i] - mean[i]) : s * from[i];
                weight[r] = c->weight[row];
            }
            product(e->sgemm, 'N', 'T', rows, H, D, x, up, 0.0f, c->u);
            activate(e, rows, c->u, weight, h);
            product(e->sgemm, 'N', 'T', rows, D, F, h, down, 0.0f, y);
            for (int64_t r = 0; r < rows; r++) {
                float *o = c->out + rank[start + r] / c->choices * D;
#pragma omp simd
                for (int64_t i = 0; i < D; i++) o[i] += y[r * D + i];
            }
        }
    }
}

/* Tokens without a group: weight m = sigmoid(logit / temperature - log_mass) for every mixture s; the K largest run as
   above with m as scale and weight, and for the others m * rest[s] is added. c->expert, c->mixture and c->weight are
   written here; c->scale is c->weight. */
void mixtura_apart(const experts_t *e, const choices_t *c) {
    const int64_t D = e->hidden, K = c->choices, S = c->mixtures;
    for (int64_t t = 0; t < c->tokens; t++) {
        const float *l = c->logits + t * S;
        float *all = c->all;
#pragma omp simd
        for (int64_t s = 0; s < S; s++) all[s] = l[s] / c->temperature - (c->log_mass ? c->log_mass[s] : c->same_mass);
        for (int64_t r = t * K; r < (t + 1) * K; r++) {
            int64_t best = 0; /* before the sigmoid, which is 1 for many large logits */
            for (int64_t s = 1; s < S; s++) best = all[s] > all[best] ? s : best;
            c->expert[r] = best / c->per_expert;
            c->mixture[r] = best;
            c->weight[r] = sigmoid_f(all[best]);
            all[best] = -INFINITY; /* taken, and its sigmoid is 0 */
        }
        for (int64_t s = 0; c->rest && s < S; s++) {
            const float m = sigmoid_f(all[s]), *rest = c->rest + s * D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) c->out[t * D + i] += m * rest[i];
        }
    }
    mixtura_chosen(e, c);
}

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
