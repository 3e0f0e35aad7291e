/* Experts on the CPU, a block of rows at a time: gathered, multiplied, activated and added back while in cache.

   Matrix products are torch's own (BLAS's sgemm, handed in as a pointer), those of experts of few rows native_tiles.h's;
   this file fuses what lies between them. native.py calls it. All arrays are float32 and contiguous.

   Letters: E experts, D hidden, F expert width, H = 2F when gated (gate columns first) else F, R rows sorted by expert.
   token[r] is the row of x and out that row r reads and adds to. Without `token`, rows are where they are and weights
   are 1. An expert has a token at most once, so the rows of a block never add to the same place. */

#include <math.h>
#include <string.h>

#include "native_common.h"
#include "native_tiles.h"

enum { RELU = 0, SILU = 1 };

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

/* h = act(gate) * up * weight, for n numbers of one row, which share a weight, or, with `apart`, of n rows. Called with
   constants for `silu`, `gated` and `apart`, so that each case is its own loop. */
static inline void activate_run(
    int silu, int gated, int apart, int64_t n, const float *gate, const float *up, const float *weight, float *h) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float act = silu ? gate[i] * sigmoid_f(gate[i]) : (gate[i] < 0.0f ? 0.0f : gate[i]);
        h[i] = act * (gated ? up[i] : 1.0f) * weight[apart ? i : 0];
    }
}

/* Given grad = grad_y @ down: h as above in `h` and the gradients of gate and up; that of a weight, <grad_y, y> =
   <grad, h / weight>, is added to. */
static inline void activate_run_backward(
    int silu, int gated, int apart, int64_t n, const float *gate, const float *up, const float *weight,
    const float *grad, float *h, float *grad_gate, float *grad_up, float *grad_weight) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        const float s = silu ? sigmoid_f(gate[i]) : (gate[i] > 0.0f ? 1.0f : 0.0f);
        const float act = silu ? gate[i] * s : (gate[i] < 0.0f ? 0.0f : gate[i]);
        const float slope = silu ? s * (1.0f + gate[i] * (1.0f - s)) : s;
        const float other = gated ? up[i] : 1.0f, w = weight[apart ? i : 0], weighted = grad[i] * w;
        const float inner = grad[i] * act * other;
        if (apart) grad_weight[i] += inner;
        else sum += inner;
        h[i] = act * other * w;
        grad_gate[i] = weighted * other * slope;
        if (gated) grad_up[i] = weighted * act;
    }
    if (!apart) *grad_weight += sum;
}

/* One loop for each kind of expert. */
#define EACH_KIND(e, RUN, APART, ...)                                  \
    switch (2 * ((e)->activation == SILU) + ((e)->gated != 0)) {       \
        case 3: RUN(1, 1, APART, __VA_ARGS__); break;                  \
        case 2: RUN(1, 0, APART, __VA_ARGS__); break;                  \
        case 1: RUN(0, 1, APART, __VA_ARGS__); break;                  \
        default: RUN(0, 0, APART, __VA_ARGS__);                        \
    }

typedef struct {
    sgemm_t sgemm;
    int64_t threads, block, experts, hidden, width, gated, activation;
    const int64_t *counts, *token; /* (E,); (R,) or NULL */
    const float *weight;           /* (R,), or NULL where token is */
    const float *x, *up, *down;    /* (T, D), (E, H, D), (E, D, F) */
    float *scratch;                /* block * (3D + 2F + H) */
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

static void activate_backward(
    const experts_t *e, int64_t rows, const float *u, const float *weight, const float *grad, float *h, float *grad_u,
    float *grad_weight) {
    const int64_t F = e->width, H = e->gated ? 2 * F : F;
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *w = weight ? weight + r : &ONE, *gate = u + r * H;
        float *grad_gate = grad_u + r * H, inner = 0.0f;
        EACH_KIND(e, activate_run_backward, 0, F, gate, gate + F, w, grad + r * F, h + r * F, grad_gate, grad_gate + F,
                  &inner)
        if (grad_weight) grad_weight[r] = inner;
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

/* Experts of few rows, or narrow ones, whose products are those of native_tiles.h. The rows of a block are the columns of
   panels, P of them: filled up to whole vectors with numbers that nothing reads. */
enum { FEW_ROWS = 128, NARROW = 128 }; /* rows and width up to which they are faster than sgemm: measured */

static int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Rows of a block of such an expert, or 0 if it is not one. */
static int64_t panel_rows(const experts_t *e, int64_t rows) {
    const int64_t fit = e->block / 2 < FEW_ROWS ? e->block / 2 / LANES * LANES : FEW_ROWS; /* in the scratch */
    if (fit == 0 || e->hidden < LANES || e->width < LANES || (rows > fit && e->width > NARROW)) return 0;
    return rows < fit ? rows : fit;
}

static const float *row_of(const experts_t *e, const float *from, int64_t r) {
    return from + (e->token ? e->token[r] : r) * e->hidden;
}

/* to (D, P) = rows of a block, turned: the tokens' rows, or the rows where they are. */
static void into_panel(const experts_t *e, const float *from, int64_t start, int64_t rows, float *to) {
    const int64_t D = e->hidden, P = whole_vectors(rows);
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t r = 0; r < P; r += TURNED) {
        const float *lines[TURNED]; /* a row again for the columns past the last, which nothing reads */
        for (int i = 0; i < TURNED; i++) lines[i] = row_of(e, from, start + (r + i < rows ? r + i : rows - 1));
        int64_t d = 0;
        for (; d + TURNED <= D; d += TURNED) turn(lines, d, to + d * P + r, P);
        for (; d < D; d++)
            for (int i = 0; i < TURNED; i++) to[d * P + r + i] = lines[i][d];
    }
}

/* Rows (rows, n) with `to_row` between them = panel (n, P).T; with `token` added to the tokens' rows. */
static void from_panel(
    const int64_t *token, int64_t threads, int64_t n, int64_t rows, const float *panel, float *to, int64_t to_row) {
    const int64_t P = whole_vectors(rows);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r += TURNED) {
        const int64_t count = rows - r < TURNED ? rows - r : TURNED;
        for (int64_t d = 0; d < n; d += TURNED) {
            const int64_t width = n - d < TURNED ? n - d : TURNED;
            float square[TURNED * TURNED];
            const float *lines[TURNED];
            for (int i = 0; i < TURNED; i++) lines[i] = panel + (d + (i < width ? i : 0)) * P;
            turn(lines, r, square, TURNED);
            for (int64_t i = 0; i < count; i++) {
                float *row = to + (token ? token[r + i] : r + i) * to_row + d;
                const float *own = square + i * TURNED;
                if (width == TURNED) {
                    oct_t sum = *(const oct_t *)own;
                    if (token) sum += *(const oct_t *)row;
                    *(oct_t *)row = sum;
                } else
                    for (int64_t j = 0; j < width; j++) row[j] = token ? row[j] + own[j] : own[j];
            }
        }
    }
}

/* Copies n rows between a panel (n, P) and memory without its zeros (n, rows). */
static void pack(int64_t n, int64_t rows, float *panel, float *packed, int into_panel) {
    const int64_t P = whole_vectors(rows);
    for (int64_t i = 0; i < n; i++) {
        if (into_panel) {
            memcpy(panel + i * P, packed + i * rows, rows * sizeof(float));
            memset(panel + i * P + rows, 0, (P - rows) * sizeof(float));
        } else memcpy(packed + i * rows, panel + i * P, rows * sizeof(float));
    }
}

/* The weights of a block's rows, and zeros up to whole vectors. */
static void weights_of(const experts_t *e, int64_t start, int64_t rows, float *weight) {
    for (int64_t r = 0; r < rows; r++) weight[r] = e->weight ? e->weight[start + r] : 1.0f;
    for (int64_t r = rows; r < whole_vectors(rows); r++) weight[r] = 0.0f;
}

/* As a block of mixtura_experts_forward; u (rows * H) is kept as a panel. */
static void few_forward(
    const experts_t *e, const float *up, const float *down, int64_t start, int64_t rows, float *u, float *out) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F, P = whole_vectors(rows);
    float *x = e->scratch, *y = x + D * P, *h = y + D * P, *own_u = h + F * P;
    float weight[FEW_ROWS];
    if (P == rows) own_u = u;
    into_panel(e, e->x, start, rows, x);
    weight_by_panel(e->threads, H, P, D, up, x, own_u);
    weights_of(e, start, rows, weight);
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t f = 0; f < F; f++) {
        EACH_KIND(e, activate_run, 1, P, own_u + f * P, own_u + (F + f) * P, weight, h + f * P)
    }
    weight_by_panel(e->threads, D, P, F, down, h, y);
    if (e->token) from_panel(e->token + start, e->threads, D, rows, y, out, D);
    else from_panel(NULL, e->threads, D, rows, y, out + start * D, D);
    if (P != rows) pack(H, rows, own_u, u, 0);
}

/* As a block of mixtura_experts_backward; `add` to the weights' gradients. */
static void few_backward(
    const experts_t *e, const float *up, const float *down, int64_t start, int64_t rows, const float *u,
    const float *grad, float *grad_x, float *grad_weight, int add, float *grad_up, float *grad_down) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F, P = whole_vectors(rows);
    const int64_t h_row = whole_vectors(F); /* rows that begin where vectors do are read faster */
    float *x = e->scratch, *grad_y = x + D * P, *grad_h = grad_y + D * P;
    float *h = grad_h + F * P, *grad_u = h + F * P, *h_rows = grad_u + H * P, *own_u = h_rows + rows * h_row;
    float weight[FEW_ROWS], inner[FEW_ROWS] = {0};
    if (P != rows) pack(H, rows, own_u, (float *)u, 1);
    else own_u = (float *)u;
    into_panel(e, grad, start, rows, grad_y);
    turned_weight_by_panel(e->threads, F, P, D, down, grad_y, grad_h);
    weights_of(e, start, rows, weight);
    const int64_t columns = whole_vectors((P + e->threads - 1) / e->threads);
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t r = 0; r < P; r += columns) {
        const int64_t run = P - r < columns ? P - r : columns;
        for (int64_t f = r; f < F * P; f += P) {
            EACH_KIND(e, activate_run_backward, 1, run, own_u + f, own_u + F * P + f, weight + r, grad_h + f, h + f,
                      grad_u + f, grad_u + F * P + f, inner + r)
        }
    }
    if (grad_weight) memcpy(grad_weight + start, inner, rows * sizeof(float));
    from_panel(NULL, e->threads, F, rows, h, h_rows, h_row);
    gradient_of_weight(e->threads, D, F, rows, grad_y, P, h_rows, h_row, add, grad_down);
    gradient_of_weight(e->threads, H, D, rows, grad_u, P, rows_of(e, e->x, start, rows, x), D, add, grad_up);
    turned_weight_by_panel(e->threads, D, P, H, up, grad_u, grad_y); /* grad_y's place: the gradient of x */
    if (e->token) from_panel(e->token + start, e->threads, D, rows, grad_y, grad_x, D);
    else from_panel(NULL, e->threads, D, rows, grad_y, grad_x + start * D, D);
}

/* out: (T, D) of zeros with `token`, else (R, D); u: (R, H), kept for the backward pass, an expert of
   few rows as (H, rows). */
void mixtura_experts_forward(const experts_t *e, float *u, float *out) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F;
    float *x_copy = e->scratch, *y = x_copy + e->block * D, *h = y + e->block * D;
    int64_t start = 0;
    for (int64_t n = 0; n < e->experts; n++) {
        const float *up = e->up + n * H * D, *down = e->down + n * D * F;
        const int64_t end = start + e->counts[n];
        const int64_t few = panel_rows(e, end - start);
        for (int64_t rows; few && start < end; start += rows) {
            rows = end - start < few ? end - start : few;
            few_forward(e, up, down, start, rows, u + start * H, out);
        }
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
        const int64_t few = panel_rows(e, end - start);
        for (int64_t rows, add = 0; few && start < end; start += rows, add = 1) {
            rows = end - start < few ? end - start : few;
            few_backward(e, up, down, start, rows, u + start * H, grad, grad_x, grad_weight, add, grad_up + n * H * D,
                         grad_down + n * D * F);
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
