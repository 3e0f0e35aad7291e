/* A few tokens, inference only; small_batch.py calls it. Letters as in native_experts.h.

   With few tokens a layer is products of a matrix and some vectors, which wait for the weights to arrive from memory.
   So one call does the choice, the order, the products and the sum, in memory that the caller keeps from step to step.
   In a decoding step the products are those of native_dots.h; other passes have BLAS's, on one thread. */

#include <math.h>
#include <string.h>

#include "native_dots.h"
#include "native_experts.h"

/* Bytes of weights from which threads share the work of a decoding step: to wake them takes longer than less. */
enum { SHARED_BYTES = 4 << 20 };

/* Each token's choices, as they come: T tokens, K choices of each, row r = t*K + k, S mixtures. */
typedef struct {
    int64_t tokens, choices, mixtures, per_expert;
    int64_t shared;                /* all choices of a token read its row of x (T, D); else x is (T, K, D) */
    int64_t decoding;              /* whether this is a decoding step: see the top */
    int64_t softmax, normalize;    /* how token choice makes weights of logits, else sigmoids; and that they sum to 1 */
    float temperature, same_mass, factor;
    int64_t *expert, *mixture;     /* (T, K): which expert, and which row of `mean` and `output` */
    const float *scale;            /* (T, K), or NULL, which is 1 */
    float *weight;                 /* (T, K) */
    const float *logits;           /* (T, S) */
    const float *log_mass;         /* (S,), or NULL where all mixtures have `same_mass` */
    const float *mean, *output;    /* (S, D), or NULL, which is 0 */
    float *u, *all;                /* room for block * H and S numbers; a decoding step's scratch has block * 32 more */
    int64_t *rank;                 /* room for T*K + E numbers */
    float *out;                    /* (T, D), added to */
} choices_t;

/* A counting sort of the choices by expert: tokens that share an expert then read its weights once. The rows of expert
   n end at ends[n], and begin where those of the expert before it end. */
static void sort_choices(const experts_t *e, const choices_t *c, int64_t *rank, int64_t *ends) {
    const int64_t R = c->tokens * c->choices;
    memset(ends, 0, e->experts * sizeof(int64_t));
    for (int64_t r = 0; r < R; r++) ends[c->expert[r]]++;
    for (int64_t n = 0, before = 0; n < e->experts; n++) {
        const int64_t count = ends[n];
        ends[n] = before; /* where its rows begin; the next loop moves it to where they end */
        before += count;
    }
    for (int64_t r = 0; r < R; r++) rank[ends[c->expert[r]]++] = r;
}

/* x (D,) = the input of a choice: s * x + (1 - s) * mean, in the form that gives the mean itself for s = 0 and rounds
   once less. */
static void input_of(const experts_t *e, const choices_t *c, int64_t row, float *x) {
    const int64_t D = e->hidden;
    const float *from = e->x + (c->shared ? row / c->choices : row) * D;
    const float s = c->scale ? c->scale[row] : 1.0f;
    const float *mean = c->mean ? c->mean + c->mixture[row] * D : NULL;
#pragma omp simd
    for (int64_t i = 0; i < D; i++) x[i] = mean ? mean[i] + s * (from[i] - mean[i]) : s * from[i];
}

static void add_to(float *out, const float *y, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] += y[i];
}

static void multiply_in_blocks(const experts_t *e, const choices_t *c, const int64_t *rank, const int64_t *ends) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F;
    float *x = e->scratch, *y = x + e->block * D, *h = y + e->block * D, *weight = h + e->block * F;
    int64_t start = 0;
    for (int64_t n = 0; n < e->experts; n++) {
        const float *up = e->up + n * H * D, *down = e->down + n * D * F;
        for (int64_t rows; start < ends[n]; start += rows) {
            rows = ends[n] - start < e->block ? ends[n] - start : e->block;
            for (int64_t r = 0; r < rows; r++) {
                input_of(e, c, rank[start + r], x + r * D);
                weight[r] = c->weight[rank[start + r]];
            }
            product(e->sgemm, 'N', 'T', rows, H, D, x, up, 0.0f, c->u);
            activate(e, rows, c->u, weight, h);
            product(e->sgemm, 'N', 'T', rows, D, F, h, down, 0.0f, y);
            for (int64_t r = 0; r < rows; r++) add_to(c->out + rank[start + r] / c->choices * D, y + r * D, D);
        }
    }
}

/* Rows of a decoding step, sorted by expert, with their inputs x (end - start, D) and activations h (end - start, F). A
   line of the cache lies unused between two rows of these, or those of sizes that are powers of two would have the same
   places in the cache. */
enum { LINE = 16 };
typedef struct {
    int64_t start, end;
    const int64_t *rank, *ends;
    float *x, *h, *y;
} step_t;

/* Where the rows of expert n that begin at `from` end, within those of the step. */
static int64_t end_of(const step_t *s, int64_t n, int64_t from) {
    const int64_t end = s->ends[n] < s->end ? s->ends[n] : s->end;
    return end > from ? end : from;
}

/* Columns first to last of h, which needs no other columns of the first projection than these. */
static void columns_of_h(const experts_t *e, const choices_t *c, const step_t *s, int64_t first, int64_t last) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F;
    const dots_t dots = {D, D + LINE, H};
    for (int64_t n = 0, from = s->start, to; from < s->end; n++, from = to) {
        to = end_of(s, n, from);
        const float *x = s->x + (from - s->start) * dots.x_row;
        for (int64_t column = first; to > from && column < H; column += F) { /* those of the gate, then the others */
            float *u = c->u + (from - s->start) * H + column;
            few_rows_product(&dots, last - first, to - from, x, e->up + (n * H + column) * D, u);
        }
        for (int64_t r = from; r < to; r++) {
            const float *gate = c->u + (r - s->start) * H + first, *weight = c->weight + s->rank[r];
            float *h = s->h + (r - s->start) * (F + LINE) + first;
            EACH_KIND(e, activate_run, 0, last - first, gate, gate + F, weight, h)
        }
    }
}

/* Columns first to last of out. */
static void columns_of_out(const experts_t *e, const choices_t *c, const step_t *s, int64_t first, int64_t last) {
    const int64_t D = e->hidden, F = e->width;
    const dots_t dots = {F, F + LINE, D};
    for (int64_t n = 0, from = s->start, to; from < s->end; n++, from = to) {
        to = end_of(s, n, from);
        const float *h = s->h + (from - s->start) * dots.x_row;
        float *y = s->y + (from - s->start) * D + first;
        if (to > from) few_rows_product(&dots, last - first, to - from, h, e->down + (n * D + first) * F, y);
        for (int64_t r = from; r < to; r++)
            add_to(c->out + s->rank[r] / c->choices * D + first, y + (r - from) * D, last - first);
    }
}

/* Of n columns, where those of a thread begin: whole lines of the cache, which no two threads then write. */
static int64_t first_of(int64_t n, int64_t thread, int64_t threads) {
    const int64_t first = ((n + threads - 1) / threads + LINE - 1) / LINE * LINE * thread;
    return first < n ? first : n;
}

/* Threads share out the columns of every expert, which is as much work for each whatever was chosen, and leaves the
   order of all sums as it is. */
static void multiply_few_rows(const experts_t *e, const choices_t *c, const step_t *s, int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t r = s->start; r < s->end; r++)
            input_of(e, c, s->rank[r], s->x + (r - s->start) * (e->hidden + LINE));
#pragma omp for schedule(static, 1)
        for (int64_t t = 0; t < threads; t++)
            columns_of_h(e, c, s, first_of(e->width, t, threads), first_of(e->width, t + 1, threads));
#pragma omp for schedule(static, 1)
        for (int64_t t = 0; t < threads; t++)
            columns_of_out(e, c, s, first_of(e->hidden, t, threads), first_of(e->hidden, t + 1, threads));
    }
}

static void run_decoding_step(const experts_t *e, const choices_t *c, const int64_t *rank, const int64_t *ends) {
    const int64_t D = e->hidden, F = e->width, R = c->tokens * c->choices;
    float *x = e->scratch, *h = x + e->block * (D + LINE), *y = h + e->block * (F + LINE);
    int64_t bytes = 0;
    for (int64_t n = 0, before = 0; n < e->experts; before = ends[n++])
        bytes += (ends[n] > before) * (e->gated ? 3 : 2) * D * F * sizeof(float);
    for (int64_t start = 0; start < R; start += e->block) {
        const step_t s = {start, R - start < e->block ? R : start + e->block, rank, ends, x, h, y};
        multiply_few_rows(e, c, &s, bytes < SHARED_BYTES ? 1 : e->threads);
    }
}

/* out += the sum over the choices of a token of weight * f_expert(scale * x + (1 - scale) * mean). Inference only.
   A token may choose an expert more than once. e->weight, e->counts and e->token are not looked at.
   Returns 1, with nothing written, where an expert's number is out of range. */
int mixtura_small_batch(const experts_t *e, const choices_t *c) {
    int64_t *rank = c->rank, *ends = rank + c->tokens * c->choices;
    if (any_outside(c->expert, c->tokens * c->choices, e->experts)) return 1;
    sort_choices(e, c, rank, ends);
    if (c->decoding) run_decoding_step(e, c, rank, ends);
    else multiply_in_blocks(e, c, rank, ends);
    return 0;
}

/* Of the S numbers in `all` the K largest: their places into c->mixture, their experts into c->expert, from row `row` on,
   and the numbers into c->weight. Those taken become -INFINITY. */
static void take_largest(const choices_t *c, int64_t row, float *all) {
    /* K passes over S numbers: K is small, and sorting would cost more. */
    for (int64_t r = row; r < row + c->choices; r++) {
        int64_t best = 0;
        for (int64_t s = 1; s < c->mixtures; s++) best = all[s] > all[best] ? s : best;
        c->expert[r] = best / c->per_expert;
        c->mixture[r] = best;
        c->weight[r] = all[best];
        all[best] = -INFINITY;
    }
}

/* Token choice: a token's K experts of the largest logits, with the softmax of these or their sigmoids for weights.
   c->expert, c->mixture and c->weight are written here. */
int mixtura_token_choice(const experts_t *e, const choices_t *c) {
    const int64_t K = c->choices, S = c->mixtures;
    for (int64_t t = 0; t < c->tokens; t++) {
        float *all = c->all, *weight = c->weight + t * K, rest = 0.0f, sum = 0.0f;
        memcpy(all, c->logits + t * S, S * sizeof(float));
        take_largest(c, t * K, all);
        const float largest = weight[0];
        if (c->softmax && !c->normalize)
            for (int64_t s = 0; s < S; s++) rest += expf(all[s] - largest);
        for (int64_t k = 0; k < K; k++) {
            weight[k] = c->softmax ? expf(weight[k] - largest) : sigmoid_f(weight[k]);
            sum += weight[k];
        }
        /* The least sum is that of layers/token_choice.py. */
        const float over = c->normalize ? (sum < 1e-20f ? 1e-20f : sum) : c->softmax ? sum + rest : 1.0f;
        for (int64_t k = 0; k < K; k++) weight[k] *= c->factor / over;
    }
    return mixtura_small_batch(e, c);
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
        /* Compared before the sigmoid, which is 1 for many large logits and would leave their order to chance, and which
           is 0 of those taken. */
        take_largest(c, t * K, all);
        for (int64_t r = t * K; r < (t + 1) * K; r++) c->weight[r] = sigmoid_f(c->weight[r]);
        /* A mixture that does not run is close to its mean, so the expert's output for the mean stands in for it. */
        for (int64_t s = 0; c->output && s < S; s++) {
            const float m = sigmoid_f(all[s]), *output = c->output + s * D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) c->out[t * D + i] += m * output[i];
        }
    }
    return mixtura_small_batch(e, c);
}
