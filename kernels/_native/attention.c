/* Attention of short windows over pages: what a decode step asks for.

Keys are read where they lie, a block of them at a time; a running maximum keeps the exponentials in range. The query
heads that share a key head share its reading. */

#ifndef FLOAT

#include "common.h"

#define BLOCK 64       /* keys whose scores are held at once */

static int is_there(size query_len, size kv_len, size first_row, size tokens, const int64_t *pages, size room,
                    size page_size, size num_pages) {
    if (query_len < 0 || query_len > kv_len || kv_len > room * page_size) return 0;
    if (first_row < 0 || query_len > tokens - first_row) return 0;
    for (size page = 0; page * page_size < kv_len; page++)
        if (pages[page] < 0 || pages[page] >= num_pages) return 0;
    return 1;
}

#define BODY "attention.c"
#include "formats.h"

#else

/* scores[j] = q . key j; keys lie `stride` numbers apart. */
static inline void FLOAT(score)(const float *q, const real *keys, size stride, size count, size dim, float *scores) {
    size j = 0;
    for (; j + 4 <= count; j += 4) {
        const real *k0 = keys + j * stride, *k1 = k0 + stride, *k2 = k1 + stride, *k3 = k2 + stride;
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (size i = 0; i < dim; i++) {
            a += q[i] * LOAD(k0[i]);
            b += q[i] * LOAD(k1[i]);
            c += q[i] * LOAD(k2[i]);
            d += q[i] * LOAD(k3[i]);
        }
        scores[j] = a, scores[j + 1] = b, scores[j + 2] = c, scores[j + 3] = d;
    }
    for (; j < count; j++) {
        const real *key = keys + j * stride;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size i = 0; i < dim; i++) sum += q[i] * LOAD(key[i]);
        scores[j] = sum;
    }
}

/* sums += weights[j] * value j. */
static inline void FLOAT(mix)(const float *weights, const real *values, size stride, size count, size dim,
                              float *sums) {
    size j = 0;
    for (; j + 4 <= count; j += 4) {
        const real *v0 = values + j * stride, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
        float a = weights[j], b = weights[j + 1], c = weights[j + 2], d = weights[j + 3];
#pragma omp simd
        for (size i = 0; i < dim; i++)
            sums[i] += (a * LOAD(v0[i]) + b * LOAD(v1[i])) + (c * LOAD(v2[i]) + d * LOAD(v3[i]));
    }
    for (; j < count; j++) {
        const real *value = values + j * stride;
#pragma omp simd
        for (size i = 0; i < dim; i++) sums[i] += weights[j] * LOAD(value[i]);
    }
}

static void FLOAT(one_head)(const float *q, const real *keys, const real *values, const int64_t *pages,
                            size page_size, size stride, size dim, size first_key, size num_keys, real *out) {
    float scores[BLOCK], sums[MAX_HEAD_DIM];
    float highest = -INFINITY, total = 0;
    memset(sums, 0, sizeof(float) * dim);
    for (size page = first_key / page_size, start = first_key; start < num_keys; page++)
        for (size in_page = start % page_size; in_page < page_size && start < num_keys;) {
            size count = num_keys - start < page_size - in_page ? num_keys - start : page_size - in_page;
            count = count < BLOCK ? count : BLOCK;
            size place = (pages[page] * page_size + in_page) * stride;
            FLOAT(score)(q, keys + place, stride, count, dim, scores);
            float before = highest;
            for (size j = 0; j < count; j++) highest = scores[j] > highest ? scores[j] : highest;
            float shrink = exponential(before - highest), block_total = 0;
#pragma omp simd reduction(+ : block_total)
            for (size j = 0; j < count; j++) {
                scores[j] = exponential(scores[j] - highest);
                block_total += scores[j];
            }
            total = total * shrink + block_total;
            if (shrink != 1)
                for (size i = 0; i < dim; i++) sums[i] *= shrink;
            FLOAT(mix)(scores, values + place, stride, count, dim, sums);
            in_page += count;
            start += count;
        }
    float inverse = 1.0f / total;
    for (size i = 0; i < dim; i++) out[i] = STORE(sums[i] * inverse);
}

/* windows: query lengths, key lengths and first rows of all sequences. reach: how many of its last keys a query sees, 0
   for all. Returns -1, or before anything is read the first sequence whose rows, lengths or pages are not there. */
size FLOAT(paged_attention)(const real *q, size q_stride, size tokens, const real *k_cache, const real *v_cache,
                            size num_pages, const int64_t *page_table, size table_stride, const int64_t *windows,
                            size sequences, size heads, size kv_heads, size dim, size page_size, size reach,
                            float scale, real *out) {
    const int64_t *query_lens = windows, *kv_lens = windows + sequences, *query_start = kv_lens + sequences;
    size share = heads / kv_heads;
    float scaled[MAX_HEAD_DIM];
    for (size s = 0; s < sequences; s++)
        if (!is_there(query_lens[s], kv_lens[s], query_start[s], tokens, page_table + s * table_stride, table_stride,
                      page_size, num_pages))
            return s;
    for (size s = 0; s < sequences; s++)
        for (size n = 0; n < query_lens[s]; n++) {
            size row = query_start[s] + n, num_keys = kv_lens[s] - query_lens[s] + n + 1;
            size first_key = reach && reach < num_keys ? num_keys - reach : 0;
            for (size h = 0; h < heads; h++) {
                const real *query = q + row * q_stride + h * dim;
                for (size i = 0; i < dim; i++) scaled[i] = LOAD(query[i]) * scale;
                FLOAT(one_head)(scaled, k_cache + h / share * dim, v_cache + h / share * dim,
                                page_table + s * table_stride, page_size, kv_heads * dim, dim, first_key, num_keys,
                                out + (row * heads + h) * dim);
            }
        }
    return -1;
}

#endif
