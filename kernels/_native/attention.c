/* Attention of short windows over pages: what a decode step asks for.

Keys are read where they lie, a block of them at a time; a running maximum keeps the exponentials in range. The query
heads that share a key head share its reading: a number that is loaded serves all of them. */

#ifndef FLOAT

#include "columns.h"
#include "sharing.h"

enum { BLOCK = 64, QUERIES = 8 }; /* keys whose scores are held at once, and queries that go together */
enum { SERIAL_PRODUCTS = 1 << 19 }; /* up to which a second thread costs more than it brings */

static int is_there(size query_len, size kv_len, size first_row, size tokens, const int64_t *pages, size room,
                    size page_size, size num_pages) {
    if (query_len < 0 || query_len > kv_len || kv_len > room * page_size) return 0;
    if (first_row < 0 || query_len > tokens - first_row) return 0;
    for (size page = 0; page * page_size < kv_len; page++)
        if (pages[page] < 0 || pages[page] >= num_pages) return 0;
    return 1;
}

#ifdef WIDE_REGISTERS
/* sums[q][first + i] += weights[q][j] * values[j][i] for up to `chunks` registers of i and `queries` queries. */
#define MIX_TILE(name, type, load)                                                                                     \
    static inline __attribute__((always_inline)) void mix_tile_##name(                                                 \
        float weights[][BLOCK], const size queries, const type *values, size stride, size count, size left,            \
        float sums[][MAX_HEAD_DIM], size first, const size chunks) {                                                   \
        __m512 total[4][4];                                                                                            \
        for (size n = 0; n < queries; n++)                                                                             \
            for (size c = 0; c < chunks; c++) total[n][c] = up_to_16_floats(sums[n] + first + 16 * c, left - 16 * c);  \
        for (size j = 0; j < count; j++) {                                                                             \
            __m512 value[4];                                                                                           \
            for (size c = 0; c < chunks; c++) value[c] = load(values + j * stride + 16 * c, left - 16 * c);            \
            for (size n = 0; n < queries; n++)                                                                         \
                for (size c = 0; c < chunks; c++)                                                                      \
                    total[n][c] = _mm512_fmadd_ps(_mm512_set1_ps(weights[n][j]), value[c], total[n][c]);               \
        }                                                                                                              \
        for (size n = 0; n < queries; n++)                                                                             \
            for (size c = 0; c < chunks; c++) {                                                                        \
                size rest = left - 16 * c;                                                                             \
                _mm512_mask_storeu_ps(sums[n] + first + 16 * c, (__mmask16)(rest >= 16 ? 0xffff : (1u << rest) - 1),   \
                                      total[n][c]);                                                                    \
            }                                                                                                          \
    }                                                                                                                  \
    static inline void mix_tiles_##name(float weights[][BLOCK], size queries, const type *values, size stride,         \
                                        size count, size left, float sums[][MAX_HEAD_DIM], size first) {               \
        size chunks = left > 48 ? 4 : (left + 15) / 16;                                                                \
        MIX_CASES(name, 1) MIX_CASES(name, 2) MIX_CASES(name, 3) MIX_CASES(name, 4)                                    \
    }
#define MIX_CASE(name, n, c)                                                                                           \
    if (queries == n && chunks == c) mix_tile_##name(weights, n, values, stride, count, left, sums, first, c);
#define MIX_CASES(name, n) MIX_CASE(name, n, 1) MIX_CASE(name, n, 2) MIX_CASE(name, n, 3) MIX_CASE(name, n, 4)

MIX_TILE(float32, float, up_to_16_floats)
MIX_TILE(bfloat16, bfloat16, up_to_16_widened)
#endif

#define BODY "attention.c"
#include "formats.h"

#else

/* scores[q][j] = scale * (query q . key j); queries lie `dim` numbers apart, keys `stride`. */
static inline void FLOAT(score)(const real *q, size queries, const real *keys, size stride, size count, size dim,
                                float scale, float scores[QUERIES][BLOCK]) {
    for (size j = 0; j < count; j += 4) {
        const real *four[4];
        float sums[4 * QUERIES] = {0};
        for (size c = 0; c < 4; c++) four[c] = keys + (j + c < count ? j + c : count - 1) * stride;
        FLOAT(columns)(q, dim, queries, four, dim, sums);
        for (size n = 0; n < queries; n++)
            for (size c = 0; c < 4; c++) scores[n][j + c] = sums[4 * n + c] * scale;
    }
}

/* sums[q] += weights[q][j] * value j. */
static inline void FLOAT(mix)(float weights[QUERIES][BLOCK], size queries, const real *values, size stride, size count,
                              size dim, float sums[QUERIES][MAX_HEAD_DIM]) {
#ifdef WIDE_REGISTERS
    for (size first = 0; first < dim; first += 64)
        for (size n = 0; n < queries; n += 4)
            FLOAT(mix_tiles)(weights + n, queries - n < 4 ? queries - n : 4, values + first, stride, count,
                             dim - first, sums + n, first);
#else
    for (size n = 0; n < queries; n++)
        for (size j = 0; j < count; j++) {
            const real *value = values + j * stride;
#pragma omp simd
            for (size i = 0; i < dim; i++) sums[n][i] += weights[n][j] * LOAD(value[i]);
        }
#endif
}

/* Some queries of heads that share a key head. */
static void FLOAT(one_key_head)(const real *q, size queries, const real *keys, const real *values,
                                const int64_t *pages, size page_size, size stride, size dim, size first_key,
                                size num_keys, float scale, real *out) {
    float scores[QUERIES][BLOCK], sums[QUERIES][MAX_HEAD_DIM], highest[QUERIES], total[QUERIES];
    for (size n = 0; n < queries; n++) {
        highest[n] = -INFINITY, total[n] = 0;
        memset(sums[n], 0, sizeof(float) * dim);
    }
    for (size page = first_key / page_size, start = first_key; start < num_keys; page++)
        for (size in_page = start % page_size; in_page < page_size && start < num_keys;) {
            size count = num_keys - start < page_size - in_page ? num_keys - start : page_size - in_page;
            count = count < BLOCK ? count : BLOCK;
            size place = (pages[page] * page_size + in_page) * stride;
            FLOAT(score)(q, queries, keys + place, stride, count, dim, scale, scores);
            for (size n = 0; n < queries; n++) {
                float *weights = scores[n], before = highest[n], block_total = 0, most = before;
#pragma omp simd reduction(max : most)
                for (size j = 0; j < count; j++) most = weights[j] > most ? weights[j] : most;
                highest[n] = most;
#pragma omp simd reduction(+ : block_total)
                for (size j = 0; j < count; j++) {
                    weights[j] = exponential(weights[j] - most);
                    block_total += weights[j];
                }
                float shrink = exponential(before - most);
                total[n] = total[n] * shrink + block_total;
                if (shrink != 1)
                    for (size i = 0; i < dim; i++) sums[n][i] *= shrink;
            }
            FLOAT(mix)(scores, queries, values + place, stride, count, dim, sums);
            in_page += count;
            start += count;
        }
    for (size n = 0; n < queries; n++) {
        float inverse = 1.0f / total[n];
        for (size i = 0; i < dim; i++) out[n * dim + i] = STORE(sums[n][i] * inverse);
    }
}

typedef struct {
    const real *q, *k_cache, *v_cache;
    real *out;
    const int64_t *page_table, *windows;
    size q_stride, table_stride, sequences, heads, kv_heads, dim, page_size, reach, parts;
    float scale;
} FLOAT(Attention);

/* The queries of sequence s that share key head h. */
static void FLOAT(one_sequence)(const FLOAT(Attention) *a, size s, size h) {
    size share = a->heads / a->kv_heads, dim = a->dim;
    size query_len = a->windows[s], kv_len = a->windows[a->sequences + s], start = a->windows[2 * a->sequences + s];
    for (size n = 0; n < query_len; n++) {
        size row = start + n, num_keys = kv_len - query_len + n + 1;
        size first_key = a->reach && a->reach < num_keys ? num_keys - a->reach : 0;
        for (size first = 0; first < share; first += QUERIES) {
            size head = h * share + first, queries = share - first < QUERIES ? share - first : QUERIES;
            FLOAT(one_key_head)(a->q + row * a->q_stride + head * dim, queries, a->k_cache + h * dim,
                                a->v_cache + h * dim, a->page_table + s * a->table_stride, a->page_size,
                                a->kv_heads * dim, dim, first_key, num_keys, a->scale,
                                a->out + (row * a->heads + head) * dim);
        }
    }
}

/* Key heads lie beside each other: whoever reads one has the next at hand. */
static void FLOAT(part_of_attention)(const void *job, size part) {
    const FLOAT(Attention) *a = job;
    size each = a->parts / a->sequences, s = part / each, n = part % each;
    for (size h = a->kv_heads * n / each; h < a->kv_heads * (n + 1) / each; h++) FLOAT(one_sequence)(a, s, h);
}

/* windows: query lengths, key lengths and first rows of all sequences. reach: how many of its last keys a query sees, 0
   for all. Returns -1, or before anything is read the first sequence whose rows, lengths or pages are not there. */
size FLOAT(paged_attention)(const real *q, size q_stride, size tokens, const real *k_cache, const real *v_cache,
                            size num_pages, const int64_t *page_table, size table_stride, const int64_t *windows,
                            size sequences, size heads, size kv_heads, size dim, size page_size, size reach,
                            float scale, real *out, size threads) {
    const int64_t *query_lens = windows, *kv_lens = windows + sequences, *query_start = kv_lens + sequences;
    size work = 0, longest = 0;
    for (size s = 0; s < sequences; s++) {
        if (!is_there(query_lens[s], kv_lens[s], query_start[s], tokens, page_table + s * table_stride, table_stride,
                      page_size, num_pages))
            return s;
        size own = query_lens[s] * kv_lens[s];
        work += own, longest = own > longest ? own : longest;
    }
    int has_long = sequences < 2 * threads || longest * threads > work; /* for one thread, while the others wait */
    size parts = has_long ? sequences * kv_heads : sequences;
    FLOAT(Attention) job = {q, k_cache, v_cache, out, page_table, windows, q_stride, table_stride, sequences, heads,
                            kv_heads, dim, page_size, reach, parts, scale};
    share(parts, work * heads * dim > SERIAL_PRODUCTS ? threads : 1, FLOAT(part_of_attention), &job);
    return -1;
}

#endif
