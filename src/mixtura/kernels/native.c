/* Experts on the CPU, a block of rows at a time: gathered, multiplied, activated and added back while in cache.

   Matrix products are torch's own (BLAS's sgemm, handed in as a pointer); experts of few rows have those of
   native_tiles.h. This file fuses what lies between them, and native.py calls it. All arrays are float32 and
   contiguous.

   Letters: E experts, D hidden, F expert width, H = 2F when gated (gate columns first) else F, R rows sorted by expert.
   token[r] is the row of x and out that row r reads and adds to. Without `token`, rows are where they are and weights
   are 1. Rows of one token may share an expert. */

#include <string.h>

#include "native_experts.h"
#include "native_tiles.h"

/* From the gradient of the activated rows: h once more, which is cheaper to compute again than to keep, the gradient of
   the first projection, and that of the weights. */
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

/* Adds the rows of a block to their tokens. Threads share out the columns, not the rows: rows of one token may then lie
   in one block, and no two threads ever add to the same number, so the sums have one order. */
static void add_back(const experts_t *e, const float *from, int64_t start, int64_t rows, float *to) {
    const int64_t D = e->hidden, line = 16; /* floats of a cache line, which two threads should not both write */
    const int64_t columns = ((D + e->threads - 1) / e->threads + line - 1) / line * line;
#pragma omp parallel for num_threads(e->threads) if (e->threads > 1)
    for (int64_t first = 0; first < D; first += columns) {
        const int64_t count = D - first < columns ? D - first : columns;
        for (int64_t r = 0; r < rows; r++) {
            float *o = to + e->token[start + r] * D + first;
            const float *y = from + r * D + first;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) o[i] += y[i];
        }
    }
}

/* Experts of few rows, with the products of native_tiles.h.

   BLAS packs a weight into its own layout before it multiplies. With thousands of rows that cost vanishes; with a few
   dozen it is most of the time, as every number of the weight is then used only that often. So the weight is read where
   it lies, and instead the rows, which are small, are turned into a panel: row r of the expert is column r, and one
   vector holds the same coordinate of several rows. A panel has P columns, the rows filled up to whole vectors. What
   the filling holds is never read, since every column is computed from itself alone and only real rows are written
   back. */
/* Rows up to which that is faster, measured; for the first projection alone it still is where all three products and
   the turning back together no longer are. */
enum { FEW_ROWS = 96, UP_ROWS = 128 };

static int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

static int is_small_batch(const experts_t *e, int64_t rows, int64_t most) {
    const int64_t fit = e->block / 2 < most ? e->block / 2 : most; /* in the scratch */
    return rows > 0 && whole_vectors(rows) <= fit && e->hidden >= LANES && e->width >= LANES;
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

/* A row of a square, `width` of its numbers, written or added. */
static inline void put_row(float *row, const float *own, int64_t width, int add) {
    if (width == TURNED) {
        oct_t sum = *(const oct_t *)own;
        if (add) sum += *(const oct_t *)row;
        *(oct_t *)row = sum;
    } else
        for (int64_t j = 0; j < width; j++) row[j] = add ? row[j] + own[j] : own[j];
}

/* Rows (rows, n) with `to_row` between them = panel (n, P).T; with `token` added to the tokens' rows. Threads share out
   the columns n, for the reason that `add_back` gives. */
static void from_panel(
    const int64_t *token, int64_t threads, int64_t n, int64_t rows, const float *panel, float *to, int64_t to_row) {
    const int64_t P = whole_vectors(rows);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t d = 0; d < n; d += 2 * TURNED) { /* two squares are the cache line that is written to a row */
        const float *lines[2 * TURNED]; /* the first line again for those past the last, which nothing reads */
        for (int i = 0; i < 2 * TURNED; i++) lines[i] = panel + (d + i < n ? d + i : d) * P;
        for (int64_t r = 0; r < rows; r += TURNED) {
            const int64_t count = rows - r < TURNED ? rows - r : TURNED;
            for (int64_t first = 0; first < 2 * TURNED && d + first < n; first += TURNED) {
                const int64_t width = n - d - first < TURNED ? n - d - first : TURNED;
                float square[TURNED * TURNED];
                turn(lines + first, r, square, TURNED);
                for (int64_t i = 0; i < count; i++) {
                    float *row = to + (token ? token[r + i] : r + i) * to_row + d + first;
                    /* The next line of every row: stores wait for their lines one after another, and took half of the
                       time of a product on processors whose caches are far away. */
                    if (first == 0) __builtin_prefetch(row + 2 * TURNED, 1);
                    put_row(row, square + i * TURNED, width, token != NULL);
                }
            }
        }
    }
}

/* The rows of a block (D, P), back: added to the tokens' rows, or written where they are. */
static void rows_from_panel(const experts_t *e, int64_t start, int64_t rows, const float *panel, float *to) {
    const int64_t D = e->hidden;
    if (e->token) from_panel(e->token + start, e->threads, D, rows, panel, to, D);
    else from_panel(NULL, e->threads, D, rows, panel, to + start * D, D);
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

/* As a block of mixtura_experts_forward. The first projection u (rows * H) is kept for the backward pass as a panel,
   because that pass needs it as one again; where P is not the number of rows it is kept without the filling, so that it
   takes the memory that u has anyway. Hence both passes must agree on which experts are few: they ask the same
   function. */
static void small_forward(
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
    rows_from_panel(e, start, rows, y, out);
    if (P != rows) pack(H, rows, own_u, u, 0);
}

/* As a block of mixtura_experts_backward; an expert of few rows has one block, so weight gradients are written, not
   added to. The scratch is filled in the order of use, and what is no longer needed gives its place to what comes
   next. */
static void small_backward(
    const experts_t *e, const float *up, const float *down, int64_t start, int64_t rows, const float *u,
    const float *grad, float *grad_x, float *grad_weight, float *grad_up, float *grad_down) {
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
    gradient_of_weight(e->threads, D, F, rows, grad_y, P, h_rows, h_row, grad_down);
    gradient_of_weight(e->threads, H, D, rows, grad_u, P, rows_of(e, e->x, start, rows, x), D, grad_up);
    turned_weight_by_panel(e->threads, D, P, H, up, grad_u, grad_y); /* grad_y's place: the gradient of x */
    rows_from_panel(e, start, rows, grad_y, grad_x);
}

/* An expert's rows are cut into blocks of about one size. Cutting off whole blocks would leave a last one of few rows,
   for which BLAS packs the weight as for a whole one. */
static int64_t block_of(const experts_t *e, int64_t rows) {
    const int64_t blocks = (rows + e->block - 1) / e->block;
    return blocks > 1 ? (rows + blocks - 1) / blocks : e->block;
}

/* u (rows, H) = rows of a block @ up.T; sgemm turns the weights first, which takes long beside few rows. */
static void first_projection(const experts_t *e, const float *up, int64_t start, int64_t rows, float *u) {
    const int64_t D = e->hidden, H = e->gated ? 2 * e->width : e->width, P = whole_vectors(rows);
    float *x = e->scratch, *panel = x + D * P;
    if (is_small_batch(e, rows, UP_ROWS)) {
        into_panel(e, e->x, start, rows, x);
        weight_by_panel(e->threads, H, P, D, up, x, panel);
        from_panel(NULL, e->threads, H, rows, panel, u, H);
    } else product(e->sgemm, 'N', 'T', rows, H, D, rows_of(e, e->x, start, rows, x), up, 0.0f, u);
}

static void forward(const experts_t *e, float *u, float *out) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F;
    float *y = e->scratch + e->block * D, *h = y + e->block * D;
    int64_t start = 0;
    for (int64_t n = 0; n < e->experts; n++) {
        const float *up = e->up + n * H * D, *down = e->down + n * D * F;
        const int64_t end = start + e->counts[n];
        if (is_small_batch(e, end - start, FEW_ROWS)) {
            small_forward(e, up, down, start, end - start, u + start * H, out);
            start = end;
        }
        const int64_t block = block_of(e, end - start);
        for (int64_t rows; start < end; start += rows) {
            rows = end - start < block ? end - start : block;
            float *block_u = u + start * H, *block_y = e->token ? y : out + start * D;
            first_projection(e, up, start, rows, block_u);
            activate(e, rows, block_u, e->weight ? e->weight + start : NULL, h);
            product(e->sgemm, 'N', 'T', rows, D, F, h, down, 0.0f, block_y);
            if (e->token) add_back(e, y, start, rows, out);
        }
    }
}

static void backward(
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
        /* Without rows no block writes, and the memory came uninitialised. */
        if (start == end) {
            memset(grad_up + n * H * D, 0, H * D * sizeof(float));
            memset(grad_down + n * D * F, 0, D * F * sizeof(float));
        }
        if (is_small_batch(e, end - start, FEW_ROWS)) {
            small_backward(e, up, down, start, end - start, u + start * H, grad, grad_x, grad_weight,
                         grad_up + n * H * D, grad_down + n * D * F);
            start = end;
        }
        const int64_t block = block_of(e, end - start);
        for (int64_t rows; start < end; start += rows, beta = 1.0f) {
            rows = end - start < block ? end - start : block;
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

/* There are two ways to use several threads. To share out the experts needs no waiting between the steps of an expert,
   but threads then finish together only if they have about as many rows each. Else all threads share the work on one
   expert after the other, and wait for each other after every step.

   Whose an expert is follows from where the middle of its rows lies among all rows, so that it depends on the counts
   alone: both passes, and every run, share out alike. */
static int64_t thread_of(const experts_t *e, int64_t before, int64_t count, int64_t total) {
    return (2 * before + count) * e->threads / (2 * total);
}

static int are_shared_out(const experts_t *e) {
    if (e->threads == 1 || (e->token && !e->others)) return 0;
    int64_t total = 0, before = 0, most = 0, own = 0, thread = 0;
    for (int64_t n = 0; n < e->experts; n++) total += e->counts[n];
    for (int64_t n = 0; n < e->experts; before += e->counts[n++]) {
        if (e->counts[n] == 0) continue;
        if (thread_of(e, before, e->counts[n], total) != thread) own = 0;
        thread = thread_of(e, before, e->counts[n], total);
        own += e->counts[n];
        most = own > most ? own : most;
    }
    return 4 * most * e->threads <= 5 * total; /* a quarter more than an even share */
}

/* The experts of one thread, from expert `first` and row `start` on, with a scratch of its own. An expert without rows
   is the thread's whose rows come before it. */
static experts_t share_of(const experts_t *e, int64_t thread, int64_t *first, int64_t *start) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F;
    int64_t total = 0, before = 0, experts = 0, owner = 0;
    for (int64_t n = 0; n < e->experts; n++) total += e->counts[n];
    *first = *start = 0;
    for (int64_t n = 0; n < e->experts; before += e->counts[n++]) {
        if (e->counts[n] > 0) owner = thread_of(e, before, e->counts[n], total);
        if (owner < thread) *first = n + 1, *start = before + e->counts[n];
        experts += owner == thread;
    }
    experts_t own = *e;
    own.threads = 1, own.experts = experts, own.counts += *first, own.up += *first * H * D, own.down += *first * D * F;
    own.scratch += thread * e->block * (3 * D + 2 * F + H);
    if (own.weight) own.weight += *start;
    if (own.token) own.token += *start;
    else own.x += *start * D;
    return own;
}

/* Where a thread adds to. Experts of different threads may have the same tokens, and two threads that add to one number
   would lose sums or add in an order that changes from run to run. So every thread but the first has an output of its
   own, and `sum_up` adds these in the order of the threads. */
static float *sum_of(const experts_t *e, int64_t thread, float *out) {
    if (thread == 0) return out;
    float *own = e->others + (thread - 1) * e->tokens * e->hidden;
    memset(own, 0, e->tokens * e->hidden * sizeof(float));
    return own;
}

static void sum_up(const experts_t *e, float *out) {
    const int64_t D = e->hidden;
#pragma omp parallel for num_threads(e->threads)
    for (int64_t t = 0; t < e->tokens; t++)
        for (int64_t thread = 1; thread < e->threads; thread++) {
            const float *other = e->others + ((thread - 1) * e->tokens + t) * D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) out[t * D + i] += other[i];
        }
}

static int tokens_are_outside(const experts_t *e) {
    int64_t rows = 0;
    for (int64_t n = 0; n < e->experts; n++) rows += e->counts[n];
    return e->token && any_outside(e->token, rows, e->tokens);
}

/* out: (T, D) of zeros with `token`, else (R, D); u: (R, H), kept for the backward pass, an expert of few rows as
   (H, rows). Returns 1, with nothing written, where a token's index is out of range; so does the backward pass. */
int mixtura_experts_forward(const experts_t *e, float *u, float *out) {
    if (tokens_are_outside(e)) return 1;
    const int64_t H = e->gated ? 2 * e->width : e->width;
    if (!are_shared_out(e)) {
        forward(e, u, out);
        return 0;
    }
#pragma omp parallel for num_threads(e->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < e->threads; thread++) {
        int64_t first, start;
        const experts_t own = share_of(e, thread, &first, &start);
        forward(&own, u + start * H, e->token ? sum_of(e, thread, out) : out + start * e->hidden);
    }
    if (e->token) sum_up(e, out);
    return 0;
}

/* grad_x: (T, D) of zeros with `token`, else (R, D); grad_weight: (R,) or NULL; all of grad_up and grad_down
   is written. */
int mixtura_experts_backward(
    const experts_t *e, const float *u, const float *grad, float *grad_x, float *grad_weight, float *grad_up,
    float *grad_down) {
    const int64_t D = e->hidden, F = e->width, H = e->gated ? 2 * F : F;
    if (tokens_are_outside(e)) return 1;
    if (!are_shared_out(e)) {
        backward(e, u, grad, grad_x, grad_weight, grad_up, grad_down);
        return 0;
    }
#pragma omp parallel for num_threads(e->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < e->threads; thread++) {
        int64_t first, start;
        const experts_t own = share_of(e, thread, &first, &start);
        backward(&own, u + start * H, e->token ? grad : grad + start * D,
                 e->token ? sum_of(e, thread, grad_x) : grad_x + start * D, grad_weight ? grad_weight + start : NULL,
                 grad_up + first * H * D, grad_down + first * D * F);
    }
    if (e->token) sum_up(e, grad_x);
    return 0;
}
