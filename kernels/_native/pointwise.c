/* Norms, the gated activation, rotation, and rows into pages: one pass over each row, float32 inside. Rows are shared out
   among `threads`. */

#ifndef FLOAT

#include "ops.h"

#define BODY "pointwise.c"
#include "formats.h"

#else

/* out = x / sqrt(mean(x^2) + eps) * weight; weights change from head to head: row r takes row r % num_weights, and where
   there are none the factor is 1. */
void FLOAT(rms_norm)(const real *x, const real *weight, real *out, size rows, size width, size num_weights,
                     float eps, size threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (size r = 0; r < rows; r++) {
        const real *row = x + r * width, *factors = num_weights ? weight + (r % num_weights) * width : 0;
        real *target = out + r * width;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (size i = 0; i < width; i++) total += LOAD(row[i]) * LOAD(row[i]);
        float scale = 1.0f / sqrtf(total / (float)width + eps);
        if (factors) {
#pragma omp simd
            for (size i = 0; i < width; i++) target[i] = STORE(LOAD(row[i]) * scale * LOAD(factors[i]));
        } else {
#pragma omp simd
            for (size i = 0; i < width; i++) target[i] = STORE(LOAD(row[i]) * scale);
        }
    }
}

/* residual += x, rounded as it is stored; out = its norm. */
void FLOAT(add_rms_norm)(const real *x, real *residual, const real *weight, real *out, size rows, size width,
                         float eps, size threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (size r = 0; r < rows; r++) {
        const real *row = x + r * width;
        real *stream = residual + r * width, *target = out + r * width;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (size i = 0; i < width; i++) {
            real sum = STORE(LOAD(row[i]) + LOAD(stream[i]));
            stream[i] = sum;
            total += LOAD(sum) * LOAD(sum);
        }
        float scale = 1.0f / sqrtf(total / (float)width + eps);
#pragma omp simd
        for (size i = 0; i < width; i++) target[i] = STORE(LOAD(stream[i]) * scale * LOAD(weight[i]));
    }
}

/* out [rows, inner] = silu(gate) * up of rows [gate, up]. */
void FLOAT(swiglu)(const real *gate_up, real *out, size rows, size inner, size threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (size r = 0; r < rows; r++) {
        const real *gate = gate_up + 2 * r * inner, *up = gate + inner;
        real *target = out + r * inner;
#pragma omp simd
        for (size i = 0; i < inner; i++) {
            float value = LOAD(gate[i]);
            target[i] = STORE(value / (1.0f + exponential(-value)) * LOAD(up[i]));
        }
    }
}

/* Every head of x [tokens, heads, dim] (tokens `stride` apart) by its token's angles, cos and signed_sin [tokens, dim]. */
void FLOAT(rotate)(const real *x, size stride, const float *cos, const float *signed_sin, real *out, size tokens,
                   size heads, size dim, size threads) {
    size half = dim / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (size t = 0; t < tokens; t++) {
        const float *c = cos + t * dim, *s = signed_sin + t * dim;
        for (size h = 0; h < heads; h++) {
            const real *head = x + t * stride + h * dim;
            real *target = out + (t * heads + h) * dim;
#pragma omp simd
            for (size i = 0; i < half; i++) {
                float first = LOAD(head[i]), second = LOAD(head[half + i]);
                target[i] = STORE(first * c[i] + second * s[i]);
                target[half + i] = STORE(second * c[half + i] + first * s[half + i]);
            }
        }
    }
}

/* Rows of keys and values, `width` numbers each, to their slots. Returns -1, or before anything is written the first
   token whose slot the caches do not have. */
size FLOAT(write_pages)(real *k_cache, real *v_cache, const real *k, const real *v, size k_stride, size v_stride,
                        const int64_t *slots, size num_slots, size tokens, size width) {
    for (size t = 0; t < tokens; t++)
        if (slots[t] < 0 || slots[t] >= num_slots) return t;
    for (size t = 0; t < tokens; t++) {
        memcpy(k_cache + slots[t] * width, k + t * k_stride, width * sizeof(real));
        memcpy(v_cache + slots[t] * width, v + t * v_stride, width * sizeof(real));
    }
    return -1;
}

#endif
