// Projections: out (rows, outputs) = x (rows, inputs) @ weight (outputs, inputs).T + bias.
//
// The weight is read as it lies in the checkpoint, once from memory whatever the number of rows: no
// packed copy. Each output is dot()'s sum along the inputs, so a row's bits do not depend on how many
// rows there are. bf16 weights are summed as even and odd elements, 32 at a time, which is what
// makes them cheap to widen; with AVX512-BF16 the processor multiplies such pairs itself.
//
// With many rows, as in a prefill, each thread turns a block of the weight into panels (panel.h) that
// stay in its second-level cache: the same sums, by a faster tile.
#pragma once

#include <algorithm>

#include "packed_abi.h"
#include "panel.h"
#include "stream.h"
#include "support.h"

namespace sf {

// Bytes of weight that stay in a core's second-level cache while all rows pass over them.
constexpr int64_t LINEAR_BLOCK_BYTES = 192 * 1024;

// W is T, or bf16 under fp32 activations: a weight that bf16 holds exactly needs no wider memory.
template <class T, class W = T>
struct LinearArgs {
    const T* x;
    int64_t x_stride, rows;
    const W* weight;
    const T* bias;  // or null
    int64_t inputs, outputs;
    T* out;

    explicit LinearArgs(const sf_linear_args& args)
        : x(static_cast<const T*>(args.x)), x_stride(args.x_stride), rows(args.rows),
          weight(static_cast<const W*>(args.weight)), bias(static_cast<const T*>(args.bias)),
          inputs(args.inputs), outputs(args.outputs), out(static_cast<T*>(args.out)) {}
};

template <class T, class W>
inline void store_outputs(const LinearArgs<T, W>& args, const float* sums, int64_t ldo, int64_t row,
                          int64_t rows, int64_t first, int64_t count) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < count; j += LANES) {
            F16 y = load(sums + r * ldo + j);
            if (args.bias) y = add(y, load_upto(args.bias + first + j, count - j));
            store_upto(args.out + (row + r) * args.outputs + first + j, y, count - j);
        }
}

// Weight rows per block, at least one tile and enough blocks for every thread.
inline int64_t linear_block(int64_t inputs, int64_t outputs, int64_t threads) {
    int64_t count = LINEAR_BLOCK_BYTES / (4 * (inputs ? inputs : 1));
    const int64_t fair = ceil_div(outputs, 4 * threads);
    count = count < fair ? count : fair;
    return round_up(count < LANES ? LANES : count);
}

// From this many rows on turning the weight pays.
constexpr int64_t PANEL_MIN_ROWS = STREAM_MOST_ROWS;
// Bytes of x that are packed at a time.
constexpr int64_t PANEL_CHUNK_BYTES = 8 << 20;

// Rows of x and of the weight as dot() meets them: fp32, in its order of elements.
struct PlainRows {
    int64_t depth;
    explicit PlainRows(int64_t inputs) : depth(inputs) {}
    int64_t scratch() const { return 0; }
    const float* rows(const float* from, int64_t, int64_t, float*) const { return from; }
    int64_t stride(int64_t ld) const { return ld; }
};

// Fetch part `part` of `parts` of `count` floats.
inline void fetch_share(const float* from, int64_t count, int64_t part, int64_t parts) {
    for (int64_t i = part * count / parts; i < (part + 1) * count / parts; i += LANES)
        __builtin_prefetch(from + i, 0, 2);
}

template <class T, class W, class Widened>
inline void linear_panels(const LinearArgs<T, W>& args, const Widened& widened, int64_t threads) {
    const int64_t depth = widened.depth, size = panel_row_size(depth), runs = panel_runs(depth);
    const int64_t wide = PANELS * LANES;
    const int64_t block = ceil_div(linear_block(depth, args.outputs, threads), wide) * wide;
    static thread_local Scratch packed;
    const int64_t fit = PANEL_CHUNK_BYTES / 4 / std::max<int64_t>(1, size);
    const int64_t chunk = std::max(PANEL_MIN_ROWS, fit);
    for (int64_t top = 0; top < args.rows; top += chunk) {
        const int64_t rows = std::min(chunk, args.rows - top);
        packed.reserve(scratch_bytes(rows * size * 4));
        float* x = packed.take<float>(rows * size);
        parallel(ceil_div(rows, LANES), threads, rows * depth * 4, [&](int64_t task) {
            Scratch& scratch = Scratch::of_thread();
            scratch.reserve(scratch_bytes(widened.scratch()));
            float* room = scratch.take<float>(widened.scratch() / 4);
            for (int64_t r = task * LANES; r < rows && r < (task + 1) * LANES; ++r)
                pack_row(widened.rows(args.x + (top + r) * args.x_stride, args.x_stride, 1, room),
                         depth, x + r * size);
        });
        parallel(ceil_div(args.outputs, block), threads, rows * depth * args.outputs,
                 [&](int64_t task) {
            const int64_t first = task * block, last = std::min(first + block, args.outputs);
            Scratch& scratch = Scratch::of_thread();
            scratch.reserve(scratch_bytes(block * size * 4, widened.scratch()));
            float* panels = scratch.take<float>(block * size);
            float* room = scratch.take<float>(widened.scratch() / 4);
            for (int64_t j = first; j < first + ceil_div(last - first, wide) * wide; j += LANES) {
                const int64_t count = std::max<int64_t>(0, std::min<int64_t>(LANES, last - j));
                const W* from = args.weight + std::min(j, last) * args.inputs;
                pack_panel(widened.rows(from, args.inputs, count, room),
                           widened.stride(args.inputs), count, depth, panels + (j - first) * size);
            }
            tiles_of_six(rows, [&]<int R>(int64_t i) {
                for (int64_t j = first; j < last; j += wide) {
                    fetch_share(x + (i + R) * size, R * size, (j - first) / wide,
                                ceil_div(last - first, wide));
                    F16 sums[R][PANELS];
                    panel_tile<1>(x + i * size, size, panels + (j - first) * size, runs, sums);
                    for (int v = 0; v < PANELS; ++v) {
                        const int64_t at = j + v * LANES, n = last - at;
                        if (n <= 0) break;
                        SF_UNROLL
                        for (int r = 0; r < R; ++r) {
                            F16 y = sums[r][v];
                            if (args.bias) y = add(y, load_upto(args.bias + at, n));
                            store_upto(args.out + (top + i + r) * args.outputs + at, y, n);
                        }
                    }
                }
            });
        });
    }
}

// Outputs that a task computes with few rows: whole groups.
constexpr int64_t STREAM_TASK = 24;

// Few rows: compute(first, count, sums, ld) puts outputs [first, first + count) of all rows into
// sums.
template <class T, class W, class Compute>
inline void linear_few(const LinearArgs<T, W>& args, int64_t threads, const Compute& compute) {
    const int64_t operations = args.rows * args.inputs * args.outputs;
    parallel_stretches(args.outputs, STREAM_TASK, threads, operations,
                       [&](int64_t first, int64_t last) {
        constexpr int64_t LD = STREAM_TASK + LANES;
        float sums[PANEL_MIN_ROWS * LD];
        compute(first, last - first, sums, LD);
        store_outputs(args, sums, LD, 0, args.rows, first, last - first);
    });
}

inline void linear(const LinearArgs<float>& args, int64_t threads) {
    if (args.rows >= PANEL_MIN_ROWS) return linear_panels(args, PlainRows(args.inputs), threads);
    const int64_t depth = args.inputs;
    const float* x = args.x;
    int64_t ldx = args.x_stride;
    static thread_local Scratch padded;
    if (depth % LANES && args.rows > 1) {
        padded.reserve(scratch_bytes(args.rows * round_up(depth) * 4));
        float* to = padded.take<float>(args.rows * round_up(depth));
        for (int64_t r = 0; r < args.rows; ++r)
            for (int64_t k = 0; k < depth; k += LANES)
                store(to + r * round_up(depth) + k, load_upto(x + r * ldx + k, depth - k));
        x = to;
        ldx = round_up(depth);
    }
    linear_few(args, threads, [&](int64_t first, int64_t count, float* sums, int64_t ld) {
        const float* weight = args.weight + first * depth;
        if (args.rows == 1)
            dot<true>(x, ldx, 1, weight, depth, count, depth, sums, ld);
        else
            stream_dot(x, ldx, args.rows, weight, depth, count, depth, sums, ld);
    });
}

// A row as fp32: per 32 elements the even ones, then the odd ones; zeros after the last.
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

inline void widen_pairs(const float* row, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += 32)
        for (int64_t l = 0; l < LANES; ++l) {
            const int64_t at = i + 2 * l;
            to[i + l] = at < n ? row[at] : 0.f;
            to[i + LANES + l] = at + 1 < n ? row[at + 1] : 0.f;
        }
}

struct PairRows {
    int64_t inputs, depth;
    explicit PairRows(int64_t n) : inputs(n), depth(pairs_length(n)) {}
    int64_t scratch() const { return LANES * depth * 4; }
    template <class T>
    const float* rows(const T* from, int64_t ld, int64_t count, float* room) const {
        for (int64_t i = 0; i < count; ++i) widen_pairs(from + i * ld, inputs, room + i * depth);
        return room;
    }
    int64_t stride(int64_t) const { return depth; }
};

// A row of x, widened, against a bf16 row of the weight. The order of dot().
inline float narrow_dot(const float* a, const bf16* b, int64_t inputs) {
    F16 sums = zero(), even, odd;
    int64_t k = 0;
    for (; k + 32 <= inputs; k += 32) {
        __builtin_prefetch(b + k + 2 * DOT_AHEAD);
        load_pairs(b + k, even, odd);
        sums = fma(load(a + k), even, sums);
        sums = fma(load(a + k + LANES), odd, sums);
    }
    if (k < inputs) {
        bf16 rest[32] = {};
        std::memcpy(rest, b + k, size_t(inputs - k) * 2);
        load_pairs(rest, even, odd);
        sums = fma(load(a + k), even, sums);
        sums = fma(load(a + k + LANES), odd, sums);
    }
    return sum(sums);
}

template <class T>
inline void linear_pairs(const LinearArgs<T, bf16>& args, int64_t threads) {
    if (args.rows >= PANEL_MIN_ROWS) return linear_panels(args, PairRows(args.inputs), threads);
    const int64_t inputs = args.inputs, length = pairs_length(inputs);
    // Widened once by the caller, then read by all threads.
    static thread_local Scratch shared;
    shared.reserve(scratch_bytes(args.rows * length * 4));
    float* x = shared.take<float>(args.rows * length);
    for (int64_t r = 0; r < args.rows; ++r)
        widen_pairs(args.x + r * args.x_stride, inputs, x + r * length);
    linear_few(args, threads, [&](int64_t first, int64_t count, float* sums, int64_t ld) {
        const bf16* weight = args.weight + first * inputs;
        if (args.rows > 1) {
            stream_dot(x, length, args.rows, weight, inputs, count, inputs, sums, ld);
        } else {
            for (int64_t j = 0; j < count; ++j)
                sums[j] = narrow_dot(x, weight + j * inputs, inputs);
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

inline void linear(const LinearArgs<bf16>& args, int64_t threads) { linear_pairs(args, threads); }

#endif

inline void linear(const LinearArgs<float, bf16>& args, int64_t threads) {
    linear_pairs(args, threads);
}

}  // namespace sf
