// Root-mean-square norms, statistics in fp32, one row (or group of a row) at a time.
#pragma once

#include "elementwise.h"
#include "packed_abi.h"
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

constexpr int64_t NORM_ROWS = 8;  // of one task

template <class TX, class TO>
void norm(const sf_norm_args& args, int64_t threads) {
    const int64_t dim = args.dim, group = args.group_size;
    parallel(ceil_div(args.rows, NORM_ROWS), threads, args.rows * dim * 4, [&](int64_t task) {
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(round_up(group) * 4));
        float* values = scratch.take<float>(round_up(group));
        const int64_t last = (task + 1) * NORM_ROWS;
        for (int64_t r = task * NORM_ROWS; r < args.rows && r < last; ++r) {
            const TX* x = static_cast<const TX*>(args.x) + r * args.x_stride;
            const TX* z = args.z ? static_cast<const TX*>(args.z) + r * args.z_stride : nullptr;
            TO* out = static_cast<TO*>(args.out) + r * dim;
            for (int64_t g = 0; g < dim; g += group)
                norm_group(x + g, z ? z + g : z, static_cast<const TO*>(args.weight) + g,
                           float(args.eps), group, NormKind(args.kind), values, out + g);
        }
    });
}

// summed = x + residual, rounded to its dtype; and the plain norm of that.
template <class TX, class TR, class TO>
void add_norm(const sf_add_norm_args& args, int64_t threads) {
    const int64_t dim = args.dim;
    parallel(ceil_div(args.rows, NORM_ROWS), threads, args.rows * dim * 4, [&](int64_t task) {
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(round_up(dim) * 4));
        float* values = scratch.take<float>(round_up(dim));
        const int64_t last = (task + 1) * NORM_ROWS;
        for (int64_t r = task * NORM_ROWS; r < args.rows && r < last; ++r) {
            const TX* x = static_cast<const TX*>(args.x) + r * args.x_stride;
            const TR* residual = static_cast<const TR*>(args.residual) + r * args.residual_stride;
            TR* summed = static_cast<TR*>(args.summed) + r * dim;
            for (int64_t i = 0; i < dim; i += LANES)
                store_upto(summed + i,
                           add(load_upto(x + i, dim - i), load_upto(residual + i, dim - i)),
                           dim - i);
            norm_group(summed, summed, static_cast<const TO*>(args.weight), float(args.eps), dim,
                       NORM_PLAIN, values, static_cast<TO*>(args.out) + r * dim);
        }
    });
}

}  // namespace sf
