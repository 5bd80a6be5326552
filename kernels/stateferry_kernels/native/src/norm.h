// Root-mean-square norms, statistics in fp32, one row (or group of a row) at a time.
#pragma once

#include "elementwise.h"
#include "support.h"
#include "tile.h"

namespace sf {

enum NormKind { NORM_PLAIN = 0, GATE_THEN_NORM = 1, NORM_THEN_GATE = 2 };

// weight * (value * scale), rounded to the output's dtype after each product as the models do.
template <class TO>
inline void norm_store(F16 value, F16 scale, const TO* weight, int64_t n, TO* out) {
    TO rounded[LANES];
    store(rounded, mul(value, scale));
    store_upto(out, mul(load_upto(weight, n), load(rounded)), n);
}

// One group of `size` features. values has room for the group, in whole vectors.
template <class TX, class TZ, class TO>
inline void norm_group(const TX* x, const TZ* z, const TO* weight, float eps, int64_t size,
                       NormKind kind, float* values, TO* out) {
    F16 squares = zero();
    for (int64_t i = 0; i < size; i += LANES) {
        F16 value = load_upto(x + i, size - i);
        if (kind == GATE_THEN_NORM) value = mul(value, silu(load_upto(z + i, size - i)));
        store(values + i, value);
        squares = fma(value, value, squares);
    }
    F16 scale = set1(1.0f / std::sqrt(sum(squares) / float(size) + eps));
    for (int64_t i = 0; i < size; i += LANES) {
        norm_store(load(values + i), scale, weight + i, size - i, out + i);
        if (kind == NORM_THEN_GATE) {
            F16 gated = mul(load_upto(out + i, size - i), silu(load_upto(z + i, size - i)));
            store_upto(out + i, gated, size - i);
        }
    }
}

template <class TX, class TO>
void norm(const TX* x, int64_t x_stride, const TX* z, int64_t z_stride, const TO* weight,
          float eps, int64_t rows, int64_t dim, int64_t group_size, NormKind kind, TO* out,
          int64_t out_stride, int64_t threads) {
    const int64_t block = 8, blocks = ceil_div(rows, block);
    parallel(blocks, threads, rows * dim * 4, [&](int64_t b) {
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(round_up(group_size) * 4));
        float* values = scratch.take<float>(round_up(group_size));
        for (int64_t r = b * block; r < rows && r < (b + 1) * block; ++r)
            for (int64_t g = 0; g < dim; g += group_size)
                norm_group(x + r * x_stride + g, z ? z + r * z_stride + g : nullptr, weight + g,
                           eps, group_size, kind, values, out + r * out_stride + g);
    });
}

}  // namespace sf
