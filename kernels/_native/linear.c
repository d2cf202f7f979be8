/* x @ weight.T + bias for few rows: every weight is read once, and what is read serves all rows.

The columns of the result are cut into a part per thread. No sum depends on where the cuts are. */

#include "columns.h"

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
                columns_##name(x, inputs, rows, w, inputs, sums);                                                 \
                for (size r = 0; r < rows; r++)                                                                        \
                    for (size c = 0; c < 4; c++)                                                                       \
                        out[r * columns + column[c]] = x_store(sums[4 * r + c] + (bias ? x_load(bias[column[c]]) : 0));\
            }                                                                                                          \
        }                                                                                                              \
    }

LINEAR(linear_bfloat16, bfloat16, bfloat16, widened, narrowed, bfloat16)
LINEAR(linear_float32, float32, float, kept, kept, float)
LINEAR(mixed_linear_float32, mixed, float, kept, kept, bfloat16)
