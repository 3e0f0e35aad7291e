/* The few tokens of a decoding step, inference only; small_batch.py calls it. Letters as in native_experts.h.

   With one token a layer is a few products of a matrix and a vector, which wait for the weights to arrive from memory.
   What can be saved is everything in between: one call does the choice, the order, the products and the sum, in memory
   that the caller keeps from step to step. One thread runs it, since to wake others takes longer than the work. */

#include <string.h>

#include "native_experts.h"

/* Each token's choices, as they come: T tokens, K choices of each, row r = t*K + k, S mixtures. */
typedef struct {
    int64_t tokens, choices, mixtures, per_expert;
    int64_t shared;                /* all choices of a token read its row of x (T, D); else x is (T, K, D) */
    float temperature, same_mass;
    int64_t *expert, *mixture;     /* (T, K): which expert, and which row of `mean` and `output` */
    const float *scale;            /* (T, K), or NULL, which is 1 */
    float *weight;                 /* (T, K) */
    const float *logits;           /* (T, S) */
    const float *log_mass;         /* (S,), or NULL where all mixtures have `same_mass` */
    const float *mean, *output;    /* (S, D), or NULL, which is 0 */
    float *u, *all;                /* room for block * H and S numbers */
    int64_t *rank;                 /* room for T*K + E numbers */
    float *out;                    /* (T, D), added to */
} choices_t;

/* out += the sum over the choices of a token of weight * f_expert(scale * x + (1 - scale) * mean). Inference only.
   A token may choose an expert more than once. e->weight, e->counts and e->token are not looked at.
   Returns 1, with nothing written, where an expert's number is out of range. */
int mixtura_small_batch(const experts_t *e, const choices_t *c) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F, R = c->tokens * c->choices;
    float *x = e->scratch, *y = x + e->block * D, *h = y + e->block * D, *weight = h + e->block * F;
    int64_t *rank = c->rank, *ends = rank + R, start = 0;
    if (any_outside(c->expert, R, e->experts)) return 1;
    memset(ends, 0, e->experts * sizeof(int64_t));
    /* A counting sort of the choices by expert: tokens that share an expert then read its weights once. */
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
                const float *from = e->x + (c->shared ? row / c->choices : row) * D;
                const float s = c->scale ? c->scale[row] : 1.0f;
                const float *mean = c->mean ? c->mean + c->mixture[row] * D : NULL;
                /* s * x + (1 - s) * mean, in the form that gives the mean itself for s = 0 and rounds once less. */
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
    return 0;
}

/* Tokens without a group: weight m = sigmoid(logit / temperature - log_mass) for every mixture s; the K largest run as
   above with m as scale and weight, and for the others m * output[s] is added. c->expert, c->mixture and c->weight are
   written here; c->scale is c->weight. */
int mixtura_token_by_token(const experts_t *e, const choices_t *c) {
    const int64_t D = e->hidden, K = c->choices, S = c->mixtures;
    /* The softmax over a group gives a token the weight exp(l) / (exp(l) + mass of the others), which is a sigmoid of
       l - log(mass): see layers/token_by_token.py. */
    for (int64_t t = 0; t < c->tokens; t++) {
        const float *l = c->logits + t * S;
        float *all = c->all;
#pragma omp simd
        for (int64_t s = 0; s < S; s++) all[s] = l[s] / c->temperature - (c->log_mass ? c->log_mass[s] : c->same_mass);
        for (int64_t r = t * K; r < (t + 1) * K; r++) {
            /* K passes over S numbers: K is small, and sorting would cost more. Compared before the sigmoid, which is 1
               for many large logits and would leave their order to chance. */
            int64_t best = 0;
            for (int64_t s = 1; s < S; s++) best = all[s] > all[best] ? s : best;
            c->expert[r] = best / c->per_expert;
            c->mixture[r] = best;
            c->weight[r] = sigmoid_f(all[best]);
            all[best] = -INFINITY; /* taken, and its sigmoid is 0 */
        }
        /* A mixture that does not run is close to its mean, so the expert's output for the mean stands in for it. */
        for (int64_t s = 0; c->output && s < S; s++) {
            const float m = sigmoid_f(all[s]), *output = c->output + s * D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) c->out[t * D + i] += m * output[i];
        }
    }
    return mixtura_small_batch(e, c);
}
