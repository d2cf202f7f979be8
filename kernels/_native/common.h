/* What all the loops share: sizes, the two number formats, and an exponential that the compiler can vectorise.

A file that has one body for both formats is included twice by formats.h: FLOAT(name) is the function's name, `real` the
stored type, LOAD and STORE convert to and from float. bfloat16 is the upper half of a float; it is rounded to nearest even.
Sums are reordered only where a pragma says so: everything else means what IEEE 754 says. limits.py has the numbers
whose names begin with MAX_. */

#ifndef TANDEM_COMMON_H
#define TANDEM_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t size;
typedef uint16_t bfloat16;

static inline float widened(bfloat16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline bfloat16 narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bfloat16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded); /* a NaN must not round to infinity */
}

/* exp to two units in the last place: 2^n * e^r with |r| <= ln(2) / 2; 0 below the smallest normal, NaN for NaN. */
static inline float exponential(float x) {
    float bounded = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
    float whole = rintf(bounded * 1.44269504f);
    float rest = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    float series = 1.98756915e-4f;
    series = series * rest + 1.39819995e-3f;
    series = series * rest + 8.33345190e-3f;
    series = series * rest + 4.16657963e-2f;
    series = series * rest + 1.66666655e-1f;
    series = series * rest + 0.5f;
    float value = series * rest * rest + rest + 1.0f;
    int32_t half = (int32_t)whole >> 1, other = (int32_t)whole - half; /* 2^128 is no float: scaled in two steps */
    int32_t first = (half + 127) << 23, second = (other + 127) << 23;
    float low, high;
    memcpy(&low, &first, sizeof low);
    memcpy(&high, &second, sizeof high);
    value = value * low * high;
    return x < -87.33f ? 0.0f : (x > 88.72f ? INFINITY : value);
}

#endif
