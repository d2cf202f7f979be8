/* x @ weight.T + bias for few rows and weights of 8 or 4 bits, in parts as in linear.c.

Processors that multiply bytes take 8-bit weights as they are: a row of x is written in steps of a 2^23rd of its largest
number, the three bytes of these are multiplied with the weights, and whole numbers are added up exactly. What a step
loses is little beside the row's other numbers, unless one of them stands out by far: such a row, and other processors,
have the weights widened piece by piece. */

#include <stdlib.h>

#include "columns.h"
#include "sharing.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MULTIPLIES_BYTES 1

enum { BYTES = 64, PLANES = 3, MIDDLE = 1 << 23, MOST_INPUTS = 1 << 16 };
static const float OUTSTANDING = 64; /* times the mean magnitude of the others */
static const double STEPS = 8388600; /* a little below MIDDLE, so that rounding never reaches it */

/* The sums of the whole numbers in each of four registers. */
static inline __m128i whole_sums_of_four(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

static inline __m512i up_to_64_bytes(const int8_t *from, size left) {
    return left >= BYTES ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << left) - 1, from);
}

/* `rows` of x [rows, inputs] in steps: planes [rows, PLANES, stride] are their bytes, low ones first, MIDDLE added; steps
   [rows] are as wide as that, NaN where a number is not finite, and -1 where the largest stands out too far. */
#define IN_STEPS(name, type, load)                                                                                     \
    static inline void in_steps_##name(const type *x, size rows, size inputs, uint8_t *planes, size stride,            \
                                       double *steps) {                                                                \
        for (size r = 0; r < rows; r++, x += inputs, planes += PLANES * stride) {                                      \
            float largest = 0, total = 0, nothing = 0;                                                                 \
            _Pragma("omp simd reduction(max : largest) reduction(+ : total, nothing)")                                 \
            for (size i = 0; i < inputs; i++) {                                                                        \
                float magnitude = fabsf(load(x[i]));                                                                   \
                largest = magnitude > largest ? magnitude : largest;                                                   \
                total += magnitude;                                                                                    \
                nothing += magnitude * 0; /* NaN of what is not finite */                                              \
            }                                                                                                          \
            int is_even = largest * (float)inputs <= OUTSTANDING * (total - largest);                                  \
            steps[r] = nothing != 0 ? nothing : (is_even ? largest / STEPS : -1);                                      \
            double per_step = largest > 0 && nothing == 0 && is_even ? STEPS / largest : 0;                            \
            for (size i = 0; i < inputs; i++) {                                                                        \
                int32_t whole = per_step > 0 ? (int32_t)rint(load(x[i]) * per_step) + MIDDLE : MIDDLE;                 \
                planes[i] = (uint8_t)whole;                                                                            \
                planes[stride + i] = (uint8_t)(whole >> 8);                                                            \
                planes[2 * stride + i] = (uint8_t)(whole >> 16);                                                       \
            }                                                                                                          \
        }                                                                                                              \
    }

IN_STEPS(bfloat16, bfloat16, widened)
IN_STEPS(float32, float, kept)

/* values[4 * r + c] = row r . w[c]. */
static inline void byte_columns(const uint8_t *planes, size stride, const double *steps, size rows,
                                const int8_t *const w[4], size inputs, float *values) {
    const __m512i one = _mm512_set1_epi8(1);
    int32_t weights[4], sums[PLANES][4];
    __m512i total[PLANES][4], whole[4];
    for (size c = 0; c < 4; c++) whole[c] = _mm512_setzero_si512();
    for (size r = 0; r < rows; r++, planes += PLANES * stride, values += 4) {
        for (size p = 0; p < PLANES; p++)
            for (size c = 0; c < 4; c++) total[p][c] = _mm512_setzero_si512();
        for (size i = 0; i < inputs; i += BYTES) {
            __m512i column[4];
            for (size c = 0; c < 4; c++) column[c] = up_to_64_bytes(w[c] + i, inputs - i);
            if (!r)
                for (size c = 0; c < 4; c++) whole[c] = _mm512_dpbusd_epi32(whole[c], one, column[c]);
            for (size p = 0; p < PLANES; p++) {
                __m512i in = _mm512_loadu_si512(planes + p * stride + i);
                for (size c = 0; c < 4; c++) total[p][c] = _mm512_dpbusd_epi32(total[p][c], in, column[c]);
            }
        }
        if (!r) _mm_storeu_si128((__m128i *)weights, whole_sums_of_four(whole[0], whole[1], whole[2], whole[3]));
        for (size p = 0; p < PLANES; p++) {
            __m128i added = whole_sums_of_four(total[p][0], total[p][1], total[p][2], total[p][3]);
            _mm_storeu_si128((__m128i *)sums[p], added);
        }
        for (size c = 0; c < 4; c++) {
            int64_t sum = sums[0][c] + 256 * (int64_t)sums[1][c] + 65536 * (int64_t)sums[2][c];
            values[c] = (float)((double)(sum - (int64_t)MIDDLE * weights[c]) * steps[r]);
        }
    }
}
#endif

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

static inline void int4_to_float32(const uint8_t *packed, const float *scales, const uint8_t *zeros, size groups,
                                   size width, float *wide) {
    for (size g = 0; g < groups; g++, packed += width / 2, wide += width) {
        float scale = scales[g];
        int zero = zeros ? zeros[g] : 8;
#pragma omp simd
        for (size i = 0; i < width / 2; i++) {
            wide[i] = (float)((packed[i] & 15) - zero) * scale;
            wide[i + width / 2] = (float)((packed[i] >> 4) - zero) * scale;
        }
    }
}

enum { PIECE = 512 }; /* inputs that are widened at once */

/* weight [columns, inputs] int8 with a scale per row: columns `start` up to `end`, the weights widened. */
#define WIDE_INT8(name, type, load, store)                                                                             \
    static void wide_int8_##name(const type *x, const int8_t *weight, const float *scales, const type *bias,           \
                                 type *out, size rows, size inputs, size columns, size start, size end) {              \
        for (size n = 0; n < fours(start, end); n++) {                                                                 \
            type wide[4][PIECE];                                                                                       \
            const type *const w[4] = {wide[0], wide[1], wide[2], wide[3]};                                             \
            float sums[4 * MAX_ROWS] = {0};                                                                            \
            size column[4];                                                                                            \
            columns_of(n, start, end, column);                                                                         \
            for (size from = 0; from < inputs; from += PIECE) {                                                        \
                size count = inputs - from < PIECE ? inputs - from : PIECE;                                            \
                for (size c = 0; c < 4; c++) int8_to_##name(weight + column[c] * inputs + from, count, wide[c]);       \
                columns_##name(x + from, inputs, rows, w, count, sums);                                                \
            }                                                                                                          \
            STORE_COLUMNS(sums, load, store)                                                                           \
        }                                                                                                              \
    }

#define STORE_COLUMNS(sums, load, store)                                                                               \
    for (size r = 0; r < rows; r++)                                                                                    \
        for (size c = 0; c < 4; c++) {                                                                                 \
            float value = fmaf(sums[4 * r + c], scales[column[c]], bias ? load(bias[column[c]]) : 0);                  \
            out[r * columns + column[c]] = store(value);                                                               \
        }

WIDE_INT8(bfloat16, bfloat16, widened, narrowed)
WIDE_INT8(float32, float, kept, kept)

#ifdef MULTIPLIES_BYTES
/* The same, the bytes multiplied as they are. */
#define BYTES_INT8(name, type, load, store)                                                                            \
    static void bytes_int8_##name(const uint8_t *planes, size stride, const double *steps, const int8_t *weight,       \
                                  const float *scales, const type *bias, type *out, size rows, size inputs,            \
                                  size columns, size start, size end) {                                                \
        for (size n = 0; n < fours(start, end); n++) {                                                                 \
            float sums[4 * MAX_ROWS];                                                                                  \
            size column[4];                                                                                            \
            columns_of(n, start, end, column);                                                                         \
            const int8_t *const w[4] = {weight + column[0] * inputs, weight + column[1] * inputs,                      \
                                        weight + column[2] * inputs, weight + column[3] * inputs};                     \
            byte_columns(planes, stride, steps, rows, w, inputs, sums);                                                \
            STORE_COLUMNS(sums, load, store)                                                                           \
        }                                                                                                              \
    }

BYTES_INT8(bfloat16, bfloat16, widened, narrowed)
BYTES_INT8(float32, float, kept, kept)
#endif

typedef struct {
    const void *x, *weight, *bias;
    const float *scales;
    void *out;
    size rows, inputs, columns, parts;
    const uint8_t *planes; /* of int8 where bytes are multiplied, else null */
    const double *steps;
    size stride, groups; /* of planes, and of int4 */
    const uint8_t *zeros; /* of int4, null where all are 8 */
} Product;

#ifdef MULTIPLIES_BYTES
/* A part of the columns: by their bytes, and again for the rows that cannot be written in steps. */
#define PART_OF_INT8(name, type)                                                                                       \
    static void part_of_int8_##name(const void *job, size part) {                                                      \
        const Product *p = job;                                                                                        \
        const type *x = p->x;                                                                                          \
        type *out = p->out;                                                                                            \
        size start = p->columns * part / p->parts, end = p->columns * (part + 1) / p->parts;                           \
        if (p->planes)                                                                                                 \
            bytes_int8_##name(p->planes, p->stride, p->steps, p->weight, p->scales, p->bias, out, p->rows, p->inputs,  \
                              p->columns, start, end);                                                                 \
        else                                                                                                           \
            wide_int8_##name(x, p->weight, p->scales, p->bias, out, p->rows, p->inputs, p->columns, start, end);       \
        for (size r = 0; p->planes && r < p->rows; r++)                                                                \
            if (p->steps[r] < 0)                                                                                       \
                wide_int8_##name(x + r * p->inputs, p->weight, p->scales, p->bias, out + r * p->columns, 1, p->inputs, \
                                 p->columns, start, end);                                                              \
    }
#define PREPARED(name, job)                                                                                            \
    double steps[MAX_ROWS];                                                                                            \
    size stride = (inputs + BYTES - 1) / BYTES * BYTES;                                                                \
    uint8_t *planes = inputs <= MOST_INPUTS ? malloc(rows * PLANES * stride) : NULL;                                   \
    if (planes) in_steps_##name(x, rows, inputs, planes, stride, steps);                                               \
    job.planes = planes, job.steps = steps, job.stride = stride;
#else
#define PART_OF_INT8(name, type)                                                                                       \
    static void part_of_int8_##name(const void *job, size part) {                                                      \
        const Product *p = job;                                                                                        \
        wide_int8_##name(p->x, p->weight, p->scales, p->bias, p->out, p->rows, p->inputs, p->columns,                  \
                         p->columns * part / p->parts, p->columns * (part + 1) / p->parts);                            \
    }
#define PREPARED(name, job) uint8_t *planes = NULL;
#endif

#define INT8_LINEAR(name, type)                                                                                        \
    PART_OF_INT8(name, type)                                                                                           \
    void int8_linear_##name(const type *x, const int8_t *weight, const float *scales, const type *bias, type *out,     \
                            size rows, size inputs, size columns, size threads) {                                      \
        size parts = parts_of(rows * inputs * columns, columns / 4, threads);                                          \
        Product job = {x, weight, bias, scales, out, rows, inputs, columns, parts, NULL, NULL, 0, 0, NULL};            \
        PREPARED(name, job)                                                                                            \
        share(parts, threads, part_of_int8_##name, &job);                                                              \
        free(planes);                                                                                                  \
    }

INT8_LINEAR(bfloat16, bfloat16)
INT8_LINEAR(float32, float)

static void part_of_int4(const void *job, size part) {
    const Product *p = job;
    const uint8_t *packed = p->weight;
    const float *x = p->x, *bias = p->bias;
    float *out = p->out;
    size groups = p->groups, width = p->inputs / groups, most = PIECE > width ? PIECE / width : 1;
    size start = p->columns * part / p->parts, end = p->columns * (part + 1) / p->parts;
    for (size n = 0; n < fours(start, end); n++) {
        float wide[4][MAX_GROUP], sums[4 * MAX_ROWS] = {0};
        const float *const w[4] = {wide[0], wide[1], wide[2], wide[3]};
        size column[4];
        columns_of(n, start, end, column);
        for (size from = 0; from < groups; from += most) {
            size count = groups - from < most ? groups - from : most;
            for (size c = 0; c < 4; c++) {
                size group = column[c] * groups + from;
                const uint8_t *zeros = p->zeros ? p->zeros + group : NULL;
                int4_to_float32(packed + group * width / 2, p->scales + group, zeros, count, width, wide[c]);
            }
            columns_float32(x + from * width, p->inputs, p->rows, w, count * width, sums);
        }
        for (size r = 0; r < p->rows; r++)
            for (size c = 0; c < 4; c++)
                out[r * p->columns + column[c]] = sums[4 * r + c] + (bias ? bias[column[c]] : 0);
    }
}

/* packed [columns, inputs / 2]: in each group of inputs the low halves of its bytes, then the high ones, the group's zero
   (8 where there are none) added. */
void int4_linear_float32(const float *x, const uint8_t *packed, const float *scales, const float *bias, float *out,
                         size rows, size inputs, size columns, size threads, size groups, const uint8_t *zeros) {
    size parts = parts_of(rows * inputs * columns, columns / 4, threads);
    Product job = {x, packed, bias, scales, out, rows, inputs, columns, parts, NULL, NULL, 0, groups, zeros};
    share(parts, threads, part_of_int4, &job);
}
