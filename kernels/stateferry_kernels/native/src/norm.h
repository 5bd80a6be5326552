// Root-mean-square norms, statistics in fp32, one row (or group of a row) at a time.
#pragma once

#include <algorithm>

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
    vectors(0, size, [&](int64_t i, int64_t n) SF_STEP {
        F16 value = load_upto(x + i, n);
        if (kind == GATE_THEN_NORM) value = mul(value, silu(load_upto(z + i, n)));
        store(values + i, value);
        squares = fma(value, value, squares);
    });
    const F16 scale = set1(1.0f / std::sqrt(sum(squares) / float(size) + eps));
    vectors(0, size, [&](int64_t i, int64_t n) SF_STEP {
        norm_store(load(values + i), scale, weight + i, n, out + i);
        if (kind == NORM_THEN_GATE) {
            F16 gated = mul(load_upto(out + i, n), silu(load_upto(z + i, n)));
            store_upto(out + i, gated, n);
        }
    });
}

// Rows of one task.
inline int64_t norm_rows(int64_t rows, int64_t threads) {
    return std::clamp<int64_t>(ceil_div(rows, 2 * threads), 1, 8);
}

template <class TX, class TO>
void norm(const sf_norm_args& args, int64_t threads) {
    const int64_t dim = args.dim, group = args.group_size, block = norm_rows(args.rows, threads);
    const int64_t operations = args.rows * dim * (args.z ? 20 : 4);
    parallel(ceil_div(args.rows, block), threads, operations, [&](int64_t task) {
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(round_up(group) * 4));
        float* values = scratch.take<float>(round_up(group));
        const int64_t last = (task + 1) * block;
        for (int64_t r = task * block; r < args.rows && r < last; ++r) {
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
    const int64_t dim = args.dim, block = norm_rows(args.rows, threads);
    parallel(ceil_div(args.rows, block), threads, args.rows * dim * 4, [&](int64_t task) {
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(round_up(dim) * 4));
        float* values = scratch.take<float>(round_up(dim));
        const int64_t last = (task + 1) * block;
        for (int64_t r = task * block; r < args.rows && r < last; ++r) {
            const TX* x = static_cast<const TX*>(args.x) + r * args.x_stride;
            const TR* residual = static_cast<const TR*>(args.residual) + r * args.residual_stride;
            TR* summed = static_cast<TR*>(args.summed) + r * dim;
            vectors(0, dim, [&](int64_t i, int64_t n) SF_STEP {
                store_upto(summed + i, add(load_upto(x + i, n), load_upto(residual + i, n)), n);
            });
            norm_group(summed, summed, static_cast<const TO*>(args.weight), float(args.eps), dim,
                       NORM_PLAIN, values, static_cast<TO*>(args.out) + r * dim);
        }
    });
}

}  // namespace sf
