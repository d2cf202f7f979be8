/* x @ weight.T + bias for few rows: every weight is read once, and what is read serves all rows.

The columns of the result are cut into parts. No sum depends on where the cuts are. */

#include "columns.h"
#include "sharing.h"

typedef struct {
    const void *x, *weight, *bias;
    void *out;
    size rows, inputs, columns, parts;
} Product;

/* `function`: rows <= MAX_ROWS, columns >= 4; bias may be null. */
#define LINEAR(function, name, x_type, x_load, x_store, w_type)                                                        \
    static void part_of_##function(const void *job, size part) {                                                       \
        const Product *p = job;                                                                                        \
        const w_type *weight = p->weight;                                                                              \
        const x_type *bias = p->bias;                                                                                  \
        x_type *out = p->out;                                                                                          \
        size start = p->columns * part / p->parts, end = p->columns * (part + 1) / p->parts;                           \
        for (size n = 0; n < fours(start, end); n++) {                                                                 \
            size column[4];                                                                                            \
            columns_of(n, start, end, column);                                                                         \
            const w_type *const w[4] = {weight + column[0] * p->inputs, weight + column[1] * p->inputs,                \
                                        weight + column[2] * p->inputs, weight + column[3] * p->inputs};               \
            float sums[4 * MAX_ROWS] = {0};                                                                            \
            columns_##name(p->x, p->inputs, p->rows, w, p->inputs, sums);                                              \
            for (size r = 0; r < p->rows; r++)                                                                         \
                for (size c = 0; c < 4; c++)                                                                           \
                    out[r * p->columns + column[c]] =                                                                  \
                        x_store(sums[4 * r + c] + (bias ? x_load(bias[column[c]]) : 0));                               \
        }                                                                                                              \
    }                                                                                                                  \
    void function(const x_type *x, const w_type *weight, const x_type *bias, x_type *out, size rows, size inputs,      \
                  size columns, size threads) {                                                                        \
        size parts = parts_of(rows * inputs * columns, columns / 4, threads);                                          \
        Product job = {x, weight, bias, out, rows, inputs, columns, parts};                                            \
        share(parts, threads, part_of_##function, &job);                                                               \
    }

LINEAR(linear_bfloat16, bfloat16, bfloat16, widened, narrowed, bfloat16)
LINEAR(linear_float32, float32, float, kept, kept, float)
LINEAR(mixed_linear_float32, mixed, float, kept, kept, bfloat16)
