/* x @ weight.T + bias for few rows: every weight is read once, and what is read serves all rows.

Four rows of the weight go together, so that a number of x serves four sums. */

#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>

/* Sums of 32 products at a time, bfloat16 in, float32 out. */
static inline float dot_tail(const bfloat16 *a, const bfloat16 *b, size from, size to) {
    float sum = 0;
    for (size i = from; i < to; i++) sum += widened(a[i]) * widened(b[i]);
    return sum;
}

#define PAIRS(pointer) ((__m512bh)_mm512_loadu_si512((const void *)(pointer)))

static void four_columns(const bfloat16 *x, size rows, const bfloat16 *w, size inputs, float *sums) {
    size whole = inputs / 32 * 32;
    for (size r = 0; r < rows; r++) {
        const bfloat16 *row = x + r * inputs;
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        for (size i = 0; i < whole; i += 32) {
            __m512bh in = PAIRS(row + i);
            a = _mm512_dpbf16_ps(a, in, PAIRS(w + i));
            b = _mm512_dpbf16_ps(b, in, PAIRS(w + inputs + i));
            c = _mm512_dpbf16_ps(c, in, PAIRS(w + 2 * inputs + i));
            d = _mm512_dpbf16_ps(d, in, PAIRS(w + 3 * inputs + i));
        }
        sums[4 * r] = _mm512_reduce_add_ps(a) + dot_tail(row, w, whole, inputs);
        sums[4 * r + 1] = _mm512_reduce_add_ps(b) + dot_tail(row, w + inputs, whole, inputs);
        sums[4 * r + 2] = _mm512_reduce_add_ps(c) + dot_tail(row, w + 2 * inputs, whole, inputs);
        sums[4 * r + 3] = _mm512_reduce_add_ps(d) + dot_tail(row, w + 3 * inputs, whole, inputs);
    }
}

#else

static void four_columns(const bfloat16 *x, size rows, const bfloat16 *w, size inputs, float *sums) {
    for (size r = 0; r < rows; r++) {
        const bfloat16 *row = x + r * inputs;
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (size i = 0; i < inputs; i++) {
            float in = widened(row[i]);
            a += in * widened(w[i]);
            b += in * widened(w[inputs + i]);
            c += in * widened(w[2 * inputs + i]);
            d += in * widened(w[3 * inputs + i]);
        }
        sums[4 * r] = a, sums[4 * r + 1] = b, sums[4 * r + 2] = c, sums[4 * r + 3] = d;
    }
}

#endif

/* rows <= MAX_ROWS; bias may be null. The last columns are done again where their number is no multiple of four. */
void linear_bfloat16(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias, bfloat16 *out, size rows,
                     size inputs, size columns) {
    float sums[4 * MAX_ROWS];
    for (size n = 0; n < columns; n += 4) {
        size first = n + 4 <= columns ? n : columns - 4;
        four_columns(x, rows, weight + first * inputs, inputs, sums);
        for (size r = 0; r < rows; r++)
            for (size c = 0; c < 4; c++) {
                float value = sums[4 * r + c] + (bias ? widened(bias[first + c]) : 0);
                out[r * columns + first + c] = narrowed(value);
            }
    }
}

/* Rows in float32 times a matrix in bfloat16. The last columns are done again, as above. */
void mixed_linear_float32(const float *x, const bfloat16 *weight, const float *bias, float *out, size rows, size inputs,
                          size columns) {
    for (size n = 0; n < columns; n += 4) {
        size first = n + 4 <= columns ? n : columns - 4;
        const bfloat16 *w = weight + first * inputs;
        for (size r = 0; r < rows; r++) {
            const float *row = x + r * inputs;
            float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
            for (size i = 0; i < inputs; i++) {
                a += row[i] * widened(w[i]);
                b += row[i] * widened(w[inputs + i]);
                c += row[i] * widened(w[2 * inputs + i]);
                d += row[i] * widened(w[3 * inputs + i]);
            }
            float *target = out + r * columns + first;
            target[0] = a + (bias ? bias[first] : 0);
            target[1] = b + (bias ? bias[first + 1] : 0);
            target[2] = c + (bias ? bias[first + 2] : 0);
            target[3] = d + (bias ? bias[first + 3] : 0);
        }
    }
}

/* sums[r] += row r of x . weights, over `count` inputs; the rows of x lie `stride` numbers apart. */
static inline void add_products(const float *x, size stride, size rows, const float *weights, size count, float *sums) {
    size r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *first = x + r * stride, *second = first + stride, *third = second + stride;
        const float *fourth = third + stride;
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (size i = 0; i < count; i++) {
            a += first[i] * weights[i];
            b += second[i] * weights[i];
            c += third[i] * weights[i];
            d += fourth[i] * weights[i];
        }
        sums[r] += a, sums[r + 1] += b, sums[r + 2] += c, sums[r + 3] += d;
    }
    for (; r < rows; r++) {
        const float *row = x + r * stride;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size i = 0; i < count; i++) sum += row[i] * weights[i];
        sums[r] += sum;
    }
}

static inline void finish(const float *sums, float scale, const float *bias, float *out, size rows, size columns,
                          size n) {
    for (size r = 0; r < rows; r++) out[r * columns + n] = sums[r] * scale + (bias ? bias[n] : 0);
}

/* weight [columns, inputs] int8 with a scale per row. */
void int8_linear_float32(const float *x, const int8_t *weight, const float *scales, const float *bias, float *out,
                         size rows, size inputs, size columns) {
    float wide[MAX_GROUP];
    for (size n = 0; n < columns; n++) {
        float sums[MAX_ROWS] = {0};
        for (size start = 0; start < inputs; start += MAX_GROUP) {
            size count = inputs - start < MAX_GROUP ? inputs - start : MAX_GROUP;
            const int8_t *part = weight + n * inputs + start;
#pragma omp simd
            for (size i = 0; i < count; i++) wide[i] = (float)part[i];
            add_products(x + start, inputs, rows, wide, count, sums);
        }
        finish(sums, scales[n], bias, out, rows, columns, n);
    }
}

/* packed [columns, inputs / 2]: in each group of inputs the low halves of its bytes, then the high ones, 8 added. */
void int4_linear_float32(const float *x, const uint8_t *packed, const float *scales, const float *bias, float *out,
                         size rows, size inputs, size columns, size groups) {
    size width = inputs / groups, half = width / 2, most = MAX_GROUP / width;
    float wide[MAX_GROUP];
    for (size n = 0; n < columns; n++) {
        float sums[MAX_ROWS] = {0};
        for (size start = 0; start < groups; start += most) {
            size count = groups - start < most ? groups - start : most;
            for (size g = 0; g < count; g++) {
                const uint8_t *part = packed + (n * groups + start + g) * half;
                float scale = scales[n * groups + start + g], *low = wide + g * width, *high = low + half;
#pragma omp simd
                for (size i = 0; i < half; i++) {
                    low[i] = (float)((part[i] & 15) - 8) * scale;
                    high[i] = (float)((part[i] >> 4) - 8) * scale;
                }
            }
            add_products(x + start * width, inputs, rows, wide, count * width, sums);
        }
        finish(sums, 1.0f, bias, out, rows, columns, n);
    }
}
