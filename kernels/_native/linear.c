/* x @ weight.T + bias for few rows: every weight is read once, and what is read serves all rows.

The columns of the result are cut into a part per thread, and each part into four runs whose weights are read side by
side: memory delivers several streams faster than one, and a number of x serves four sums. Weights of 8 and 4 bits are
widened piece by piece, for all rows at once. No sum depends on where the cuts are. */

#include "common.h"

static inline float kept(float value) { return value; }

/* four_columns_<name>: sums[4 * r + c] += row r of x . w[c], over `count` inputs; the rows of x lie `stride` apart. */
#define FOUR_COLUMNS(name, x_type, x_load, w_type, w_load)                                                             \
    static void four_columns_##name(const x_type *x, size stride, size rows, const w_type *const w[4], size count,     \
                                    float *sums) {                                                                     \
        const w_type *first = w[0], *second = w[1], *third = w[2], *fourth = w[3];                                     \
        for (size r = 0; r < rows; r++, x += stride, sums += 4) {                                                      \
            float a = 0, b = 0, c = 0, d = 0;                                                                          \
            _Pragma("omp simd reduction(+ : a, b, c, d)") for (size i = 0; i < count; i++) {                           \
                float in = x_load(x[i]);                                                                               \
                a += in * w_load(first[i]);                                                                            \
                b += in * w_load(second[i]);                                                                           \
                c += in * w_load(third[i]);                                                                            \
                d += in * w_load(fourth[i]);                                                                           \
            }                                                                                                          \
            sums[0] += a, sums[1] += b, sums[2] += c, sums[3] += d;                                                    \
        }                                                                                                              \
    }

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>

/* Sums of 32 products at a time, bfloat16 in, float32 out. */
static inline float dot_tail(const bfloat16 *a, const bfloat16 *b, size from, size to) {
    float sum = 0;
    for (size i = from; i < to; i++) sum += widened(a[i]) * widened(b[i]);
    return sum;
}

#define PAIRS(pointer) ((__m512bh)_mm512_loadu_si512((const void *)(pointer)))

static void four_columns_bfloat16(const bfloat16 *x, size stride, size rows, const bfloat16 *const w[4], size count,
                                  float *sums) {
    size whole = count / 32 * 32;
    for (size r = 0; r < rows; r++, x += stride, sums += 4) {
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
        for (size i = 0; i < whole; i += 32) {
            __m512bh in = PAIRS(x + i);
            a = _mm512_dpbf16_ps(a, in, PAIRS(w[0] + i));
            b = _mm512_dpbf16_ps(b, in, PAIRS(w[1] + i));
            c = _mm512_dpbf16_ps(c, in, PAIRS(w[2] + i));
            d = _mm512_dpbf16_ps(d, in, PAIRS(w[3] + i));
        }
        sums[0] += _mm512_reduce_add_ps(a) + dot_tail(x, w[0], whole, count);
        sums[1] += _mm512_reduce_add_ps(b) + dot_tail(x, w[1], whole, count);
        sums[2] += _mm512_reduce_add_ps(c) + dot_tail(x, w[2], whole, count);
        sums[3] += _mm512_reduce_add_ps(d) + dot_tail(x, w[3], whole, count);
    }
}
#else
FOUR_COLUMNS(bfloat16, bfloat16, widened, bfloat16, widened)
#endif
FOUR_COLUMNS(float32, float, kept, float, kept)
FOUR_COLUMNS(mixed, float, kept, bfloat16, widened)

/* Which columns go together as number n of a part, and how many such fours it has: the last columns are done again
where their number is no multiple of four. */
static inline size fours(size start, size end) { return (end - start + 3) / 4; }

static inline void columns_of(size n, size start, size end, size column[4]) {
    size run = (end - start) / 4;
    for (size c = 0; c < 4; c++) column[c] = n < run ? start + c * run + n : end - 4 + c;
}

/* `function`: rows <= MAX_ROWS, columns >= 4; bias may be null. */
#define LINEAR(function, name, x_type, x_load, x_store, w_type)                                                        \
    void function(const x_type *x, const w_type *weight, const x_type *bias, x_type *out, size rows, size inputs,      \
                  size columns, size threads) {                                                                        \
        size parts = threads < columns / 4 ? threads : columns / 4;                                                    \
        _Pragma("omp parallel for num_threads(parts) if (parts > 1)") for (size part = 0; part < parts; part++) {      \
            size start = columns * part / parts, end = columns * (part + 1) / parts;                                   \
            for (size n = 0; n < fours(start, end); n++) {                                                             \
                size column[4];                                                                                        \
                columns_of(n, start, end, column);                                                                     \
                const w_type *const w[4] = {weight + column[0] * inputs, weight + column[1] * inputs,                  \
                                            weight + column[2] * inputs, weight + column[3] * inputs};                 \
                float sums[4 * MAX_ROWS] = {0};                                                                        \
                four_columns_##name(x, inputs, rows, w, inputs, sums);                                                 \
                for (size r = 0; r < rows; r++)                                                                        \
                    for (size c = 0; c < 4; c++)                                                                       \
                        out[r * columns + column[c]] = x_store(sums[4 * r + c] + (bias ? x_load(bias[column[c]]) : 0));\
            }                                                                                                          \
        }                                                                                                              \
    }

LINEAR(linear_bfloat16, bfloat16, bfloat16, widened, narrowed, bfloat16)
LINEAR(linear_float32, float32, float, kept, kept, float)
LINEAR(mixed_linear_float32, mixed, float, kept, kept, bfloat16)

/* Whole numbers of 8 bits are exact in either type; those of 4 bits are multiplied with the scale of their group. */
static inline void int8_to_float32(const int8_t *weight, size count, float *wide) {
#pragma omp simd
    for (size i = 0; i < count; i++) wide[i] = (float)weight[i];
}

static inline void int8_to_bfloat16(const int8_t *weight, size count, bfloat16 *wide) {
#pragma omp simd
    for (size i = 0; i < count; i++) {
        float value = (float)weight[i];
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        wide[i] = (bfloat16)(bits >> 16);
    }
}

static inline void int4_to_float32(const uint8_t *packed, const float *scales, size groups, size width, float *wide) {
    for (size g = 0; g < groups; g++, packed += width / 2, wide += width) {
        float scale = scales[g];
#pragma omp simd
        for (size i = 0; i < width / 2; i++) {
            wide[i] = (float)((packed[i] & 15) - 8) * scale;
            wide[i + width / 2] = (float)((packed[i] >> 4) - 8) * scale;
        }
    }
}

enum { PIECE = 512 }; /* inputs that are widened at once */

/* weight [columns, inputs] int8 with a scale per row. */
#define INT8_LINEAR(name, type, load, store)                                                                           \
    void int8_linear_##name(const type *x, const int8_t *weight, const float *scales, const type *bias, type *out,     \
                            size rows, size inputs, size columns, size threads) {                                      \
        size parts = threads < columns / 4 ? threads : columns / 4;                                                    \
        _Pragma("omp parallel for num_threads(parts) if (parts > 1)") for (size part = 0; part < parts; part++) {      \
            size start = columns * part / parts, end = columns * (part + 1) / parts;                                   \
            for (size n = 0; n < fours(start, end); n++) {                                                             \
                type wide[4][PIECE];                                                                                   \
                const type *const w[4] = {wide[0], wide[1], wide[2], wide[3]};                                         \
                float sums[4 * MAX_ROWS] = {0};                                                                        \
                size column[4];                                                                                        \
                columns_of(n, start, end, column);                                                                     \
                for (size from = 0; from < inputs; from += PIECE) {                                                    \
                    size count = inputs - from < PIECE ? inputs - from : PIECE;                                        \
                    for (size c = 0; c < 4; c++) int8_to_##name(weight + column[c] * inputs + from, count, wide[c]);   \
                    four_columns_##name(x + from, inputs, rows, w, count, sums);                                       \
                }                                                                                                      \
                for (size r = 0; r < rows; r++)                                                                        \
                    for (size c = 0; c < 4; c++) {                                                                     \
                        float value = fmaf(sums[4 * r + c], scales[column[c]], bias ? load(bias[column[c]]) : 0);          \
                        out[r * columns + column[c]] = store(value);                                                   \
                    }                                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
    }

INT8_LINEAR(bfloat16, bfloat16, widened, narrowed)
INT8_LINEAR(float32, float, kept, kept)

/* packed [columns, inputs / 2]: in each group of inputs the low halves of its bytes, then the high ones, 8 added. */
void int4_linear_float32(const float *x, const uint8_t *packed, const float *scales, const float *bias, float *out,
                         size rows, size inputs, size columns, size threads, size groups) {
    size width = inputs / groups, most = PIECE > width ? PIECE / width : 1;
    size parts = threads < columns / 4 ? threads : columns / 4;
#pragma omp parallel for num_threads(parts) if (parts > 1)
    for (size part = 0; part < parts; part++) {
        size start = columns * part / parts, end = columns * (part + 1) / parts;
        for (size n = 0; n < fours(start, end); n++) {
            float wide[4][MAX_GROUP], sums[4 * MAX_ROWS] = {0};
            const float *const w[4] = {wide[0], wide[1], wide[2], wide[3]};
            size column[4];
            columns_of(n, start, end, column);
            for (size from = 0; from < groups; from += most) {
                size count = groups - from < most ? groups - from : most;
                for (size c = 0; c < 4; c++) {
                    size group = column[c] * groups + from;
                    int4_to_float32(packed + group * width / 2, scales + group, count, width, wide[c]);
                }
                four_columns_float32(x + from * width, inputs, rows, w, count * width, sums);
            }
            for (size r = 0; r < rows; r++)
                for (size c = 0; c < 4; c++)
                    out[r * columns + column[c]] = sums[4 * r + c] + (bias ? bias[column[c]] : 0);
        }
    }
}
