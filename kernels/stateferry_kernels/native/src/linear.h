// Projections: out (rows, outputs) = x (rows, inputs) @ weight (outputs, inputs).T + bias.
//
// The weight is read as it lies in the checkpoint, once from memory whatever the number of rows: no
// packed copy. Each output is dot()'s sum along the inputs, so a row's bits do not depend on how many
// rows there are. bf16 weights are summed as even and odd elements, 32 at a time, which is what
// makes them cheap to widen; with AVX512-BF16 the processor multiplies such pairs itself.
#pragma once

#include "support.h"
#include "tile.h"

namespace sf {

// Bytes of weight that stay in a core's second-level cache while all rows pass over them.
constexpr int64_t LINEAR_BLOCK_BYTES = 192 * 1024;

template <class T>
struct LinearArgs {
    const T* x;
    int64_t x_stride, rows;
    const T* weight;
    const T* bias;  // or null
    int64_t inputs, outputs;
    T* out;
    int64_t out_stride;
};

template <class T>
inline void store_outputs(const LinearArgs<T>& args, const float* sums, int64_t ldo, int64_t row,
                          int64_t rows, int64_t first, int64_t count) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < count; j += LANES) {
            F16 y = load(sums + r * ldo + j);
            if (args.bias) y = add(y, load_upto(args.bias + first + j, count - j));
            store_upto(args.out + (row + r) * args.out_stride + first + j, y, count - j);
        }
}

// Weight rows per block, at least one tile and enough blocks for every thread.
inline int64_t linear_block(int64_t inputs, int64_t outputs, int64_t threads) {
    int64_t count = LINEAR_BLOCK_BYTES / (4 * (inputs ? inputs : 1));
    const int64_t fair = ceil_div(outputs, 4 * threads);
    count = count < fair ? count : fair;
    return round_up(count < LANES ? LANES : count);
}

// Rows that share one pass over a block: as many as stay in a core's second-level cache.
inline int64_t linear_rows(int64_t inputs, int64_t rows) {
    const int64_t fit = LINEAR_BLOCK_BYTES / (4 * (inputs ? inputs : 1)) / 6 * 6;
    const int64_t few = fit < 12 ? 12 : fit;
    return rows < few ? rows : few;
}

inline void linear(const LinearArgs<float>& args, int64_t threads) {
    const int64_t block = linear_block(args.inputs, args.outputs, threads);
    const int64_t operations = args.rows * args.inputs * args.outputs;
    parallel(ceil_div(args.outputs, block), threads, operations, [&](int64_t b) {
        const int64_t first = b * block;
        const int64_t count = args.outputs - first < block ? args.outputs - first : block;
        const int64_t most = linear_rows(args.inputs, args.rows);
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(most * block * 4));
        float* sums = scratch.take<float>(most * block);
        for (int64_t r = 0; r < args.rows; r += most) {
            const int64_t rows = args.rows - r < most ? args.rows - r : most;
            dot_streamed(args.x + r * args.x_stride, args.x_stride, rows,
                args.weight + first * args.inputs, args.inputs, count, args.inputs, sums, block);
            store_outputs(args, sums, block, r, rows, first, count);
        }
    });
}

#if defined(__AVX512BF16__) && !defined(SF_PORTABLE)

template <int R, int C>
inline void pair_tile(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t depth,
                      float* out, int64_t ldo) {
    __m512 sums[R][C];
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int j = 0; j < C; ++j) sums[i][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2 * LANES) {
        const int64_t rest = depth - k;
        const __mmask32 mask = rest >= 32 ? 0xffffffffu : (1u << rest) - 1u;
        __m512bh right[C];
        SF_UNROLL
        for (int j = 0; j < C; ++j)
            right[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, b + j * ldb + k);
        SF_UNROLL
        for (int i = 0; i < R; ++i) {
            __m512bh left = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + i * lda + k);
            SF_UNROLL
            for (int j = 0; j < C; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
        }
    }
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int j = 0; j < C; ++j) out[i * ldo + j] = sum(F16{sums[i][j]});
}

template <int R>
inline void pair_rows(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t depth,
                      int64_t cols, float* out, int64_t ldo) {
    int64_t j = 0;
    for (; j + DOT_COLS <= cols; j += DOT_COLS)
        pair_tile<R, DOT_COLS>(a, lda, b + j * ldb, ldb, depth, out + j, ldo);
    for (; j < cols; ++j) pair_tile<R, 1>(a, lda, b + j * ldb, ldb, depth, out + j, ldo);
}

inline void linear(const LinearArgs<bf16>& args, int64_t threads) {
    const int64_t block = linear_block(args.inputs, args.outputs, threads);
    const int64_t operations = args.rows * args.inputs * args.outputs;
    parallel(ceil_div(args.outputs, block), threads, operations, [&](int64_t b) {
        const int64_t first = b * block;
        const int64_t count = args.outputs - first < block ? args.outputs - first : block;
        const bf16* weight = args.weight + first * args.inputs;
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(DOT_ROWS * block * 4));
        float* sums = scratch.take<float>(DOT_ROWS * block);
        for (int64_t r = 0; r < args.rows;) {
            const bf16* x = args.x + r * args.x_stride;
            const int64_t left = args.rows - r;
            const int64_t rows = left >= DOT_ROWS ? DOT_ROWS : left >= 2 ? 2 : 1;
            if (rows == DOT_ROWS)
                pair_rows<DOT_ROWS>(x, args.x_stride, weight, args.inputs, args.inputs, count,
                                    sums, block);
            else if (rows == 2)
                pair_rows<2>(x, args.x_stride, weight, args.inputs, args.inputs, count, sums,
                             block);
            else
                pair_rows<1>(x, args.x_stride, weight, args.inputs, args.inputs, count, sums,
                             block);
            store_outputs(args, sums, block, r, rows, first, count);
            r += rows;
        }
    });
}

#else

// A bf16 row as fp32: per 32 elements the even ones, then the odd ones; zeros after the last.
inline int64_t pairs_length(int64_t n) { return (n + 31) / 32 * 32; }
inline void widen_pairs(const bf16* row, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += 32) {
        F16 even, odd;
        if (n - i >= 32) {
            load_pairs(row + i, even, odd);
        } else {
            bf16 rest[32] = {};
            std::memcpy(rest, row + i, size_t(n - i) * 2);
            load_pairs(rest, even, odd);
        }
        store(to + i, even);
        store(to + i + LANES, odd);
    }
}

// R rows of x, widened, against C bf16 weight rows, widened on the way. The order of dot().
template <int R, int C>
inline void narrow_tile(const float* a, int64_t lda, const bf16* b, int64_t ldb, int64_t inputs,
                        float* out, int64_t ldo) {
    F16 sums[R][C];
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int j = 0; j < C; ++j) sums[i][j] = zero();
    for (int64_t k = 0; k < inputs; k += 32) {
        SF_UNROLL
        for (int j = 0; j < C; ++j) {
            F16 even, odd;
            __builtin_prefetch(b + j * ldb + k + DOT_AHEAD);
            if (inputs - k >= 32) {
                load_pairs(b + j * ldb + k, even, odd);
            } else {
                bf16 rest[32] = {};
                std::memcpy(rest, b + j * ldb + k, size_t(inputs - k) * 2);
                load_pairs(rest, even, odd);
            }
            SF_UNROLL
            for (int i = 0; i < R; ++i) {
                sums[i][j] = fma(load(a + i * lda + k), even, sums[i][j]);
                sums[i][j] = fma(load(a + i * lda + k + LANES), odd, sums[i][j]);
            }
        }
    }
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int j = 0; j < C; ++j) out[i * ldo + j] = sum(sums[i][j]);
}

// From this many rows on a block of weights is widened once, and not by every tile of rows.
constexpr int64_t WIDEN_ROWS = 5;

inline void linear(const LinearArgs<bf16>& args, int64_t threads) {
    const int64_t length = pairs_length(args.inputs);
    const int64_t block = linear_block(length, args.outputs, threads);
    const int64_t operations = args.rows * args.inputs * args.outputs;
    // Widened once by the caller, then read by all threads.
    Scratch shared;
    shared.reserve(scratch_bytes(args.rows * length * 4));
    float* x = shared.take<float>(args.rows * length);
    parallel(ceil_div(args.rows, 16), threads, args.rows * length, [&](int64_t b) {
        for (int64_t r = b * 16; r < args.rows && r < (b + 1) * 16; ++r)
            widen_pairs(args.x + r * args.x_stride, args.inputs, x + r * length);
    });
    parallel(ceil_div(args.outputs, block), threads, operations, [&](int64_t b) {
        const int64_t first = b * block;
        const int64_t count = args.outputs - first < block ? args.outputs - first : block;
        const bf16* weight = args.weight + first * args.inputs;
        const bool widened = args.rows >= WIDEN_ROWS;
        Scratch& scratch = Scratch::of_thread();
        const int64_t most = linear_rows(length, args.rows);
        scratch.reserve(scratch_bytes(most * block * 4, widened ? block * length * 4 : 0));
        float* sums = scratch.take<float>(most * block);
        if (!widened) {
            auto rows = [&]<int R>(int64_t r) {
                int64_t j = 0;
                constexpr int C = R == 1 ? 1 : 2;
                for (; j + C <= count; j += C)
                    narrow_tile<R, C>(x + r * length, length, weight + j * args.inputs,
                                      args.inputs, args.inputs, sums + j, block);
                for (; j < count; ++j)
                    narrow_tile<R, 1>(x + r * length, length, weight + j * args.inputs,
                                      args.inputs, args.inputs, sums + j, block);
                store_outputs(args, sums, block, r, R, first, count);
            };
            int64_t r = 0;
            for (; r + 2 <= args.rows; r += 2) rows.template operator()<2>(r);
            if (r < args.rows) rows.template operator()<1>(r);
            return;
        }
        float* wide = scratch.take<float>(block * length);
        for (int64_t j = 0; j < count; ++j)
            widen_pairs(weight + j * args.inputs, args.inputs, wide + j * length);
        for (int64_t r = 0; r < args.rows; r += most) {
            const int64_t rows = args.rows - r < most ? args.rows - r : most;
            dot_streamed(x + r * length, length, rows, wide, length, count, length, sums, block);
            store_outputs(args, sums, block, r, rows, first, count);
        }
    });
}

#endif

}  // namespace sf
