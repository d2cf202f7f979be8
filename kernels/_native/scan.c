/* The selective scan: every channel's state goes through a sequence's tokens in registers and cache, a block of tokens
at a time, so that what all channels share of these (b and c) stays near.

    step = softplus(dt + bias)        h = e^(step a) h + step x b        y = (<h, c> + skip x) silu(gate)

`a` is negative and steps are not, so the exponent is never above zero. */

#ifndef FLOAT

#include "common.h"

#define TOKENS 64 /* whose b and c are held at once */
#define LANES 16

/* 2^x for x <= 0 to three units in the last place, 2^-125 below and for NaN; exact near 0, where a bias would add up
   over a long sequence. */
static inline float decayed(float x) {
    float bounded = x > -125.0f ? x : -125.0f;
    float whole = rintf(bounded);
    float rest = bounded - whole;
    float series = 1.32647261e-3f;
    series = series * rest + 9.67151299e-3f;
    series = series * rest + 5.55073358e-2f;
    series = series * rest + 2.40222424e-1f;
    series = series * rest + 6.93147004e-1f;
    series = series * rest + 1.0f;
    uint32_t bits; /* the power goes into the exponent, which stays above that of denormals */
    memcpy(&bits, &series, sizeof bits);
    bits += (uint32_t)(int32_t)whole << 23;
    memcpy(&series, &bits, sizeof series);
    return series;
}

/* log(1 + e^x) to three units in the last place: log(1 + e) is 2 artanh(e / (2 + e)), whose argument is at most 1/3. */
static inline float softplus(float x) {
    float power = exponential(-fabsf(x)), ratio = power / (2.0f + power), square = ratio * ratio;
    float series = 1.0f / 15.0f;
    series = series * square + 1.0f / 13.0f;
    series = series * square + 1.0f / 11.0f;
    series = series * square + 1.0f / 9.0f;
    series = series * square + 1.0f / 7.0f;
    series = series * square + 1.0f / 5.0f;
    series = series * square + 1.0f / 3.0f;
    series = series * square + 1.0f;
    return (x > 0.0f ? x : 0.0f) + 2.0f * ratio * series;
}

#define BODY "scan.c"
#include "formats.h"

#else

/* One channel through `count` tokens; b and c lie `width` numbers apart. Sums go on in LANES parts, which are added up
   in halves: in order they would take as long as everything else. */
static inline __attribute__((always_inline)) void FLOAT(channel)(
    const real *x, size x_stride, const float *steps, size channels, const float *b, const float *c, const float *a,
    float skip, float *h, real *y, size count, size width) {
    for (size t = 0; t < count; t++) {
        float step = steps[t * channels], value = LOAD(x[t * x_stride]), added = step * value;
        float doublings = step * 1.44269504f, sums[LANES] = {0};
        const float *own_b = b + t * width, *own_c = c + t * width;
        size n = 0;
        for (; n + LANES <= width; n += LANES) {
#pragma omp simd
            for (size i = 0; i < LANES; i++) {
                h[n + i] = decayed(doublings * a[n + i]) * h[n + i] + added * own_b[n + i];
                sums[i] += h[n + i] * own_c[n + i];
            }
        }
        for (size i = 0; n + i < width; i++) {
            h[n + i] = decayed(doublings * a[n + i]) * h[n + i] + added * own_b[n + i];
            sums[i] += h[n + i] * own_c[n + i];
        }
        for (size half = LANES / 2; half; half /= 2) {
#pragma omp simd
            for (size i = 0; i < half; i++) sums[i] += sums[i + half];
        }
        y[t * channels] = STORE(sums[0] + skip * value);
    }
}

/* steps[t] = softplus(dt[t] + bias) of `count` channels and `tokens` tokens. */
static void FLOAT(stepped)(const real *dt, size dt_stride, const float *bias, float *steps, size channels, size count,
                           size tokens) {
    for (size t = 0; t < tokens; t++) {
        const real *raw = dt + t * dt_stride;
        float *target = steps + t * channels;
        if (bias) {
#pragma omp simd
            for (size d = 0; d < count; d++) target[d] = softplus(LOAD(raw[d]) + bias[d]);
        } else {
#pragma omp simd
            for (size d = 0; d < count; d++) target[d] = softplus(LOAD(raw[d]));
        }
    }
}

/* y[t] *= silu(gate[t]), likewise. */
static void FLOAT(gated)(const real *gate, size gate_stride, real *y, size channels, size count, size tokens) {
    for (size t = 0; t < tokens; t++) {
        const real *own = gate + t * gate_stride;
        real *target = y + t * channels;
#pragma omp simd
        for (size d = 0; d < count; d++) {
            float value = LOAD(own[d]);
            target[d] = STORE(LOAD(target[d]) * value / (1.0f + exponential(-value)));
        }
    }
}

/* All sequences' channels [first, end); see below. */
static void FLOAT(part)(const real *x, size x_stride, const real *dt, size dt_stride, const float *bias, const real *b,
                        size b_stride, const real *c, size c_stride, const float *a, const float *skip, float *states,
                        const real *gate, size gate_stride, float *steps, real *y, const int64_t *spans,
                        size num_spans, size channels, size width, size first, size end) {
    float shared_b[TOKENS * MAX_STATE], shared_c[TOKENS * MAX_STATE], h[MAX_STATE];
    for (size s = 0; s < num_spans; s++) {
        size begin = spans[3 * s], stop = begin + spans[3 * s + 1];
        float *own = states + spans[3 * s + 2] * channels * width;
        for (size block = begin; block < stop; block += TOKENS) {
            size count = stop - block < TOKENS ? stop - block : TOKENS, place = block * channels + first;
            for (size t = 0; t < count; t++)
                for (size n = 0; n < width; n++) {
                    shared_b[t * width + n] = LOAD(b[(block + t) * b_stride + n]);
                    shared_c[t * width + n] = LOAD(c[(block + t) * c_stride + n]);
                }
            FLOAT(stepped)(dt + block * dt_stride + first, dt_stride, bias ? bias + first : bias, steps + place, channels,
                           end - first, count);
            for (size d = first; d < end; d++) {
                float *state = own + d * width;
                const real *values = x + block * x_stride + d;
                const float *own_steps = steps + block * channels + d;
                real *target = y + block * channels + d;
                memcpy(h, state, width * sizeof(float));
                if (width == 64) /* a constant that the compiler can unroll by */
                    FLOAT(channel)(values, x_stride, own_steps, channels, shared_b, shared_c, a + d * width, skip[d], h,
                                   target, count, 64);
                else
                    FLOAT(channel)(values, x_stride, own_steps, channels, shared_b, shared_c, a + d * width, skip[d], h,
                                   target, count, width);
                memcpy(state, h, width * sizeof(float));
            }
            if (gate)
                FLOAT(gated)(gate + block * gate_stride + first, gate_stride, y + place, channels, end - first, count);
        }
    }
}

/* Every channel of all sequences: spans [num_spans, 3] are (first token, tokens, slot). x, dt, b, c and gate have rows
   any distance apart; steps is room for what becomes of dt, and like y [tokens, channels]; a [channels, width], states
   [num_slots, channels, width]; bias and gate may be missing. Channels are shared out among `threads`. Returns -1, or
   before anything is written the first sequence that is not there. */
size FLOAT(selective_scan)(const real *x, size x_stride, const real *dt, size dt_stride, const float *bias,
                           const real *b, size b_stride, const real *c, size c_stride, const float *a,
                           const float *skip, float *states, const real *gate, size gate_stride, float *steps, real *y,
                           const int64_t *spans, size num_spans, size num_slots, size tokens, size channels,
                           size width, size threads) {
    for (size s = 0; s < num_spans; s++) {
        const int64_t *span = spans + 3 * s;
        if (span[0] < 0 || span[1] < 0 || span[1] > tokens - span[0] || span[2] < 0 || span[2] >= num_slots) return s;
    }
    size parts = threads < channels ? threads : channels;
    if (parts < 1) parts = 1;
#pragma omp parallel for num_threads(parts) if (parts > 1)
    for (size part = 0; part < parts; part++)
        FLOAT(part)(x, x_stride, dt, dt_stride, bias, b, b_stride, c, c_stride, a, skip, states, gate, gate_stride,
                    steps, y, spans, num_spans, channels, width, channels * part / parts,
                    channels * (part + 1) / parts);
    return -1;
}

#endif
