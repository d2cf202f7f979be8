/* All layers of a decoder over few tokens: what a decode step computes between its embedding and its head.

Each layer is the loops of the other files in turn, on the same numbers; between them there is no interpreter, which for
a small model takes longer than the loops. */

#ifndef FLOAT

#include "ops.h"
#include "sharing.h"

/* Pointers are to the format of the whole, but `half`: the bfloat16 half of a float32 matrix, or null. scales: of a
   matrix of 8-bit numbers, else null. */
typedef struct {
    const void *weight, *half, *bias;
    const float *scales;
    size columns, inputs;
} Matrix;

typedef struct {
    const void *input_norm, *qk_norm, *post_norm;
    Matrix qkv, o, gate_up, down;
    size window; /* how many of its last keys a query sees, 0 for all */
} Layer;

typedef struct {
    size layers, hidden, heads, kv_heads, dim, inner;
    float eps, scale; /* of norms, and of scores */
} Sizes;

typedef struct {
    const float *cos, *signed_sin;                       /* [tokens, dim] */
    const int64_t *slots, *page_table, *windows;         /* as write_pages and paged_attention take them */
    size tokens, sequences, table_stride, num_pages, page_size, threads;
} Step;

/* Products up to which a second thread costs more than it brings: of a matrix, and of all layers. */
enum { SERIAL_WORK = 1 << 22, SERIAL_STEP = 1 << 23 };

#define FLOAT(name) name##_float32
#define real float
#define HALVED(...) mixed_linear_float32(__VA_ARGS__)
#include "decoder_layers.c"
#undef FLOAT
#undef real
#undef HALVED

#define FLOAT(name) name##_bfloat16
#define real bfloat16
#define HALVED(...)
#include "decoder_layers.c"

#else

static void FLOAT(product)(const real *x, const Matrix *m, real *out, size rows, size threads, int is_shared) {
    size weights = m->columns * m->inputs;
    if (!is_shared && weights <= SMALL_WEIGHTS && rows * weights <= SERIAL_WORK) threads = 1;
    if (m->scales)
        FLOAT(int8_linear)(x, m->weight, m->scales, m->bias, out, rows, m->inputs, m->columns, threads);
    else if (m->half && rows <= HALVED_ROWS)
        HALVED(x, m->half, m->bias, out, rows, m->inputs, m->columns, threads);
    else
        FLOAT(linear)(x, m->weight, m->bias, out, rows, m->inputs, m->columns, threads);
}

static size FLOAT(all_layers)(const Layer *layers, const Sizes *sizes, const Step *step, real *const *caches,
                              const real *final_norm, real *hidden, real *out, real *scratch, int is_shared) {
    size tokens = step->tokens, width = sizes->hidden, dim = sizes->dim, inner = sizes->inner;
    size rotated = sizes->heads + sizes->kv_heads, all = rotated + sizes->kv_heads, num_slots;
    real *normed = scratch, *qkv = normed + tokens * width, *qk = qkv + tokens * all * dim;
    real *mixed = qk + tokens * rotated * dim, *added = mixed + tokens * sizes->heads * dim;
    real *gate_up = added + tokens * width, *act = gate_up + 2 * tokens * inner;
    num_slots = step->num_pages * step->page_size;
    FLOAT(rms_norm)(hidden, layers[0].input_norm, normed, tokens, width, 1, sizes->eps, 1);
    for (size i = 0; i < sizes->layers; i++) {
        const Layer *layer = layers + i;
        real *k_cache = caches[2 * i], *v_cache = caches[2 * i + 1];
        FLOAT(product)(normed, &layer->qkv, qkv, tokens, step->threads, is_shared);
        for (size t = 0; layer->qk_norm && t < tokens; t++) {
            real *row = qkv + t * all * dim;
            FLOAT(rms_norm)(row, layer->qk_norm, row, rotated, dim, rotated, sizes->eps, 1);
        }
        FLOAT(rotate)(qkv, all * dim, step->cos, step->signed_sin, qk, tokens, rotated, dim,
                      1);
        size refused = FLOAT(write_pages)(k_cache, v_cache, qk + sizes->heads * dim, qkv + rotated * dim, rotated * dim,
                                          all * dim, step->slots, num_slots, tokens, sizes->kv_heads * dim);
        if (refused >= 0) return refused;
        refused = FLOAT(paged_attention)(qk, rotated * dim, tokens, k_cache, v_cache, step->num_pages,
                                         step->page_table, step->table_stride, step->windows, step->sequences,
                                         sizes->heads, sizes->kv_heads, dim, step->page_size, layer->window,
                                         sizes->scale, mixed, step->threads);
        if (refused >= 0) return tokens + refused;
        FLOAT(product)(mixed, &layer->o, added, tokens, step->threads, is_shared);
        FLOAT(add_rms_norm)(added, hidden, layer->post_norm, normed, tokens, width, sizes->eps,
                            1);
        FLOAT(product)(normed, &layer->gate_up, gate_up, tokens, step->threads, is_shared);
        FLOAT(swiglu)(gate_up, act, tokens, inner, 1);
        FLOAT(product)(act, &layer->down, added, tokens, step->threads, is_shared);
        int is_last = i + 1 == sizes->layers;
        FLOAT(add_rms_norm)(added, hidden, is_last ? final_norm : layers[i + 1].input_norm, is_last ? out : normed,
                            tokens, width, sizes->eps, 1);
    }
    return -1;
}

/* hidden [tokens, hidden] is used up; out [tokens, hidden] is normed by final_norm. caches: keys and values of each layer
   in turn. scratch: room for rows of 2 * hidden + 3 * (heads + kv_heads) * dim + 3 * inner numbers. Returns -1;
   t, when the slot of token t is not there; tokens + s, when the windows or pages of sequence s are not. */
size FLOAT(decoder_layers)(const Layer *layers, const Sizes *sizes, const Step *step, real *const *caches,
                           const real *final_norm, real *hidden, real *out, real *scratch) {
    const Layer *one = layers;
    size weights = one->qkv.columns * one->qkv.inputs + one->o.columns * one->o.inputs +
                   one->gate_up.columns * one->gate_up.inputs + one->down.columns * one->down.inputs;
    double pairs = 0; /* of queries and keys */
    for (size s = 0; s < step->sequences; s++)
        pairs += (double)step->windows[s] * (double)step->windows[step->sequences + s];
    double products = (double)(step->tokens * weights) + 2 * pairs * (double)(sizes->heads * sizes->dim);
    enum Sharing sharing = (double)sizes->layers * products > SERIAL_STEP ? begin_sharing(step->threads) : ALONE;
    Step own = *step;
    if (sharing == ALONE) own.threads = 1;
    size refused = FLOAT(all_layers)(layers, sizes, &own, caches, final_norm, hidden, out, scratch, sharing == SHARED);
    if (sharing == SHARED) end_sharing();
    return refused;
}

#endif
