// What stands between the two projections of an MLP, and the rotation of queries and keys: fp32
// inside, rounded once, one pass.
#pragma once

#include "elementwise.h"
#include "packed_abi.h"
#include "support.h"

namespace sf {

enum ActivationKind { SILU_MUL = 0, RELU2 = 1 };

// Rows of few features share a task.
inline int64_t rows_per_task(int64_t n) { return n < 4096 ? 4096 / (n < 1 ? 1 : n) + 1 : 1; }

template <class T>
void activation(const sf_activation_args& args, int64_t threads) {
    const int64_t block = rows_per_task(args.n), n = args.n;
    parallel(ceil_div(args.rows, block), threads, args.rows * n * 4, [&](int64_t task) {
        for (int64_t r = task * block; r < args.rows && r < (task + 1) * block; ++r) {
            const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
            const T* y = static_cast<const T*>(args.y) + r * args.y_stride;
            T* out = static_cast<T*>(args.out) + r * n;
            vectors(0, n, [&](int64_t i, int64_t count) SF_STEP {
                F16 value = load_upto(x + i, count);
                if (args.kind == SILU_MUL) {
                    value = mul(silu(value), load_upto(y + i, count));
                } else {
                    // A NaN stays one: it is the second operand.
                    value = max(zero(), value);
                    value = mul(value, value);
                }
                store_upto(out + i, value, count);
            });
        }
    });
}

// x in another dtype, rounded once.
template <class TX, class TO>
void cast(const sf_cast_args& args, int64_t threads) {
    const int64_t block = rows_per_task(args.n), n = args.n;
    parallel(ceil_div(args.rows, block), threads, args.rows * n, [&](int64_t task) {
        for (int64_t r = task * block; r < args.rows && r < (task + 1) * block; ++r) {
            const TX* x = static_cast<const TX*>(args.x) + r * args.x_stride;
            TO* out = static_cast<TO*>(args.out) + r * n;
            vectors(0, n, [&](int64_t i, int64_t count) SF_STEP {
                store_upto(out + i, load_upto(x + i, count), count);
            });
        }
    });
}

// One head: features i and i + half are the two coordinates of a point.
template <class T>
inline void rotate_head(const T* x, const float* cos, const float* sin, int64_t half, int64_t dim,
                        T* out) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t n = half - i;
        F16 a = load_upto(x + i, n), b = load_upto(x + half + i, n);
        F16 c = load_upto(cos + i, n), s = load_upto(sin + i, n);
        store_upto(out + i, fnma(b, s, mul(a, c)), n);
        store_upto(out + half + i, fma(a, s, mul(b, c)), n);
    }
    std::memcpy(out + 2 * half, x + 2 * half, size_t(dim - 2 * half) * sizeof(T));
}

// Returns whether every position is in the tables; nothing is written when one is not.
template <class T>
bool rotary(const sf_rotary_args& args, int64_t threads) {
    for (int64_t r = 0; r < args.rows; ++r)
        if (args.position[r] < 0 || args.position[r] >= args.max_positions) return false;
    const int64_t size = args.heads * args.head_dim, block = rows_per_task(size);
    parallel(ceil_div(args.rows, block), threads, args.rows * size * 2, [&](int64_t task) {
        for (int64_t r = task * block; r < args.rows && r < (task + 1) * block; ++r) {
            const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
            const int64_t at = args.position[r] * args.half;
            for (int64_t h = 0; h < args.heads; ++h)
                rotate_head(x + h * args.head_dim, args.cos + at, args.sin + at, args.half,
                            args.head_dim, static_cast<T*>(args.out) + r * size + h * args.head_dim);
        }
    });
    return true;
}

}  // namespace sf
