/* Sums of products of some rows with four columns of a weight, the innermost loops of every linear layer here.

columns_<name>(x, stride, rows, w, count, sums): sums[4 * r + c] += row r of x . w[c] over `count` inputs; the rows of x
lie `stride` apart. With wide registers six rows go together with the four columns: a number that is loaded serves four
sums, and the order of a sum does not depend on which rows go together. */

#ifndef TANDEM_COLUMNS_H
#define TANDEM_COLUMNS_H

#include "ops.h"

static inline float kept(float value) { return value; }

#define COLUMNS(name, x_type, x_load, w_type, w_load)                                                                  \
    static inline void columns_##name(const x_type *x, size stride, size rows, const w_type *const w[4], size count,   \
                                      float *sums) {                                                                   \
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

COLUMNS(mixed, float, kept, bfloat16, widened)

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#define WIDE_REGISTERS 1

enum { TILE = 6 }; /* rows that go together: 24 sums */

/* The sums of the numbers in each of four registers. */
static inline __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* `wide`: numbers in a register; load(pointer, left): that many of them, zeros from `left` on. */
#define TILED_COLUMNS(name, type, pack, wide, load, multiply_add)                                                      \
    static inline __attribute__((always_inline)) void tile_##name(const type *x, size stride, const type *const w[4],  \
                                                                  size count, float *sums, const size rows) {          \
        __m512 total[TILE][4];                                                                                         \
        for (size r = 0; r < rows; r++)                                                                                \
            for (size c = 0; c < 4; c++) total[r][c] = _mm512_setzero_ps();                                            \
        for (size i = 0; i < count; i += wide) {                                                                       \
            pack column[4];                                                                                            \
            for (size c = 0; c < 4; c++) column[c] = load(w[c] + i, count - i);                                        \
            for (size r = 0; r < rows; r++) {                                                                          \
                pack in = load(x + r * stride + i, count - i);                                                         \
                for (size c = 0; c < 4; c++) total[r][c] = multiply_add(total[r][c], in, column[c]);                   \
            }                                                                                                          \
        }                                                                                                              \
        for (size r = 0; r < rows; r++, sums += 4) {                                                                   \
            __m128 added = sums_of_four(total[r][0], total[r][1], total[r][2], total[r][3]);                           \
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), added));                                                \
        }                                                                                                              \
    }                                                                                                                  \
    static inline void columns_##name(const type *x, size stride, size rows, const type *const w[4], size count,       \
                                      float *sums) {                                                                   \
        for (; rows >= TILE; rows -= TILE, x += TILE * stride, sums += 4 * TILE)                                       \
            tile_##name(x, stride, w, count, sums, TILE);                                                              \
        if (rows == 1) tile_##name(x, stride, w, count, sums, 1);                                                      \
        if (rows == 2) tile_##name(x, stride, w, count, sums, 2);                                                      \
        if (rows == 3) tile_##name(x, stride, w, count, sums, 3);                                                      \
        if (rows == 4) tile_##name(x, stride, w, count, sums, 4);                                                      \
        if (rows == 5) tile_##name(x, stride, w, count, sums, 5);                                                      \
    }

static inline __m512 up_to_16_floats(const float *from, size left) {
    return left >= 16 ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), from);
}

static inline __m512 up_to_16_widened(const bfloat16 *from, size left) {
    __mmask16 there = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
}

static inline __m512 multiply_add_floats(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }

TILED_COLUMNS(float32, float, __m512, 16, up_to_16_floats, multiply_add_floats)

#ifdef __AVX512BF16__
static inline __m512bh up_to_32_bfloat16(const bfloat16 *from, size left) {
    __m512i bits = left >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << left) - 1, from);
    return (__m512bh)bits;
}

TILED_COLUMNS(bfloat16, bfloat16, __m512bh, 32, up_to_32_bfloat16, _mm512_dpbf16_ps)
#else
COLUMNS(bfloat16, bfloat16, widened, bfloat16, widened)
#endif
#else
COLUMNS(float32, float, kept, float, kept)
COLUMNS(bfloat16, bfloat16, widened, bfloat16, widened)
#endif

/* Which columns go together as number n of a part, and how many such fours it has: the last columns are done again
where their number is no multiple of four. The four lie a quarter of the part apart: memory delivers several streams
faster than one. */
static inline size fours(size start, size end) { return (end - start + 3) / 4; }

static inline void columns_of(size n, size start, size end, size column[4]) {
    size run = (end - start) / 4;
    for (size c = 0; c < 4; c++) column[c] = n < run ? start + c * run + n : end - 4 + c;
}

#endif
