/* What each file offers the others, so that the compiler compares it with what they ask for. */

#ifndef TANDEM_OPS_H
#define TANDEM_OPS_H

#include "common.h"

#define DECLARED(name, real)                                                                                           \
    void linear_##name(const real *x, const real *weight, const real *bias, real *out, size rows, size inputs,         \
                       size columns, size threads);                                                                    \
    void int8_linear_##name(const real *x, const int8_t *weight, const float *scales, const real *bias, real *out,     \
                            size rows, size inputs, size columns, size threads);                                       \
    void rms_norm_##name(const real *x, const real *weight, real *out, size rows, size width, size num_weights,        \
                         float eps, size threads);                                                                     \
    void add_rms_norm_##name(const real *x, real *residual, const real *weight, real *out, size rows, size width,      \
                             float eps, size threads);                                                                 \
    void swiglu_##name(const real *gate_up, real *out, size rows, size inner, size threads);                           \
    void rotate_##name(const real *x, size stride, const float *cos, const float *signed_sin, real *out, size tokens,  \
                       size heads, size dim, size threads);                                                            \
    size write_pages_##name(real *k_cache, real *v_cache, const real *k, const real *v, size k_stride, size v_stride,  \
                            const int64_t *slots, size num_slots, size tokens, size width);                            \
    size paged_attention_##name(const real *q, size q_stride, size tokens, const real *k_cache, const real *v_cache,   \
                                size num_pages, const int64_t *page_table, size table_stride, const int64_t *windows,  \
                                size sequences, size heads, size kv_heads, size dim, size page_size, size reach,       \
                                float scale, real *out, size threads);

DECLARED(float32, float)
DECLARED(bfloat16, bfloat16)

void mixed_linear_float32(const float *x, const bfloat16 *weight, const float *bias, float *out, size rows, size inputs,
                          size columns, size threads);

#endif
