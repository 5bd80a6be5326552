// The causal convolution over raw columns: out = silu(bias + sum of taps[k] * column[t - window + k]),
// oldest column first, the bias last.
#pragma once

#include <cstring>
#include <vector>

#include "abi.h"
#include "elementwise.h"
#include "support.h"

namespace sf {

// Channels one task works on: its rows of a batch are a few cache lines each.
constexpr int64_t CONV_CHANNELS = 128;
// Of one output: mostly those of its SiLU.
constexpr int64_t CONV_OPERATIONS = 16;

// Output of channels [first, last) from TAPS columns, oldest first. The row that lies `ahead` of the
// newest one is fetched.
template <int TAPS, class T>
inline void conv_taps(const sf_conv& conv, int64_t conv_dim, const T* const* columns,
                      int64_t ahead, int64_t first, int64_t last, T* out) {
    const T* from[TAPS];
    SF_UNROLL
    for (int k = 0; k < TAPS; ++k) from[k] = columns[k];
    const float *taps = conv.taps, *bias = conv.bias;
    vectors(first, last, [&](int64_t i, int64_t n) SF_STEP {
        __builtin_prefetch(from[TAPS - 1] + ahead + i);
        F16 sum = mul(load_upto(from[0] + i, n), load_upto(taps + i, n));
        SF_UNROLL
        for (int k = 1; k < TAPS; ++k)
            sum = fma(load_upto(from[k] + i, n), load_upto(taps + k * conv_dim + i, n), sum);
        if (bias) sum = add(sum, load_upto(bias + i, n));
        store_upto(out + i, silu(sum), n);
    });
}

template <class T>
inline void conv_span(const sf_conv& conv, int64_t conv_dim, int64_t count,
                      const T* const* columns, int64_t ahead, int64_t first, int64_t last,
                      T* out) {
    if (count == 4) return conv_taps<4>(conv, conv_dim, columns, ahead, first, last, out);
    for (int64_t i = first; i < last; i += LANES) {
        const int64_t n = last - i;
        F16 sum = mul(load_upto(columns[0] + i, n), load_upto(conv.taps + i, n));
        for (int64_t k = 1; k < count; ++k)
            sum = fma(load_upto(columns[k] + i, n), load_upto(conv.taps + k * conv_dim + i, n),
                      sum);
        if (conv.bias) sum = add(sum, load_upto(conv.bias + i, n));
        store_upto(out + i, silu(sum), n);
    }
}

// A slot's columns (conv_dim, window) as rows (window, conv_dim), for channels [first, last).
template <class T>
void slot_columns(const sf_layer& layer, int64_t slot, int64_t first, int64_t last, T* rows) {
    const T* from = static_cast<const T*>(layer.conv_state) + slot * layer.conv_stride;
    for (int64_t i = first; i < last; ++i)
        for (int64_t k = 0; k < layer.window; ++k)
            rows[k * layer.conv_dim + i] = from[i * layer.window + k];
}

template <class T>
const T* tail_column(const sf_layer& layer, int64_t page, int64_t row) {
    return static_cast<const T*>(layer.tail_xBC) + page * layer.tail_xBC_stride +
           row * layer.conv_dim;
}

// One sequence's channels [first, last).
template <class T>
void conv_extend_channels(const sf_layer& layer, const sf_conv& conv, const sf_extend_plan& plan,
                          const sf_columns& columns, int64_t sequence, int64_t first,
                          int64_t last) {
    const int64_t W = layer.window, D = layer.conv_dim;
    const int64_t start = plan.start[sequence], length = plan.length[sequence];
    const int64_t old_rows = start % layer.grid, page = plan.tail_page[sequence];
    Scratch& scratch = Scratch::of_thread();
    scratch.reserve(scratch_bytes(W * D * int64_t(sizeof(T)), W * D * int64_t(sizeof(T)),
                                  (W + 1) * 8));
    T* slot = scratch.take<T>(W * D);
    T* before = scratch.take<T>(W * D);
    const T** taps = scratch.take<const T*>(W + 1);
    slot_columns(layer, plan.state_slot[sequence], first, last, slot);
    // The window before the extend, copied: its tail rows may be overwritten below.
    for (int64_t k = 0; k < W; ++k) {
        const int64_t row = old_rows - W + k;
        const T* from = row >= 0 ? tail_column<T>(layer, page, row) : slot + (row + W) * D;
        std::memcpy(before + k * D + first, from + first, size_t(last - first) * sizeof(T));
    }
    const T* batch = static_cast<const T*>(columns.xBC) + plan.offset[sequence] * columns.xBC_stride;
    T* out = static_cast<T*>(columns.out) + plan.offset[sequence] * columns.out_stride;
    auto column = [&](int64_t t) {
        return t >= 0 ? batch + t * columns.xBC_stride : before + (t + W) * D;
    };
    constexpr int64_t AHEAD = 4;
    for (int64_t t = 0; t < length; ++t) {
        for (int64_t k = 0; k <= W; ++k) taps[k] = column(t - W + k);
        conv_span(conv, D, W + 1, taps, AHEAD * columns.xBC_stride, first, last,
                  out + t * columns.out_stride);
    }
    for (int64_t b = plan.first_boundary[sequence]; b < plan.first_boundary[sequence + 1]; ++b) {
        T* to = static_cast<T*>(layer.conv_state) + plan.boundary_slot[b] * layer.conv_stride;
        const int64_t end = plan.boundary_position[b] - start;
        for (int64_t k = 0; k < W; ++k)
            for (int64_t i = first; i < last; ++i) to[i * W + k] = column(end - W + k)[i];
    }
    const int64_t grid_point = (start + length) / layer.grid * layer.grid;
    for (int64_t p = grid_point < start ? start : grid_point; p < start + length; ++p) {
        T* to = static_cast<T*>(layer.tail_xBC) + page * layer.tail_xBC_stride +
                (p - grid_point) * D;
        std::memcpy(to + first, column(p - start) + first, size_t(last - first) * sizeof(T));
    }
}

template <class T>
void conv_extend(const sf_layer& layer, const sf_conv& conv, const sf_extend_plan& plan,
                 const sf_columns& columns, int64_t threads) {
    const int64_t parts = ceil_div(layer.conv_dim, CONV_CHANNELS);
    int64_t tokens = 0;
    for (int64_t i = 0; i < plan.num_sequences; ++i) tokens += plan.length[i];
    const int64_t operations = tokens * layer.conv_dim * CONV_OPERATIONS;
    parallel(plan.num_sequences * parts, threads, operations, [&](int64_t task) {
        const int64_t first = task % parts * CONV_CHANNELS;
        const int64_t last = first + CONV_CHANNELS;
        conv_extend_channels<T>(layer, conv, plan, columns, task / parts, first,
                                last < layer.conv_dim ? last : layer.conv_dim);
    });
}

// New columns of one sequence, each after its path: row r after row parent[r] of these, or after
// the tail where that is negative.
template <class T>
void conv_rows(const sf_layer& layer, const sf_conv& conv, const sf_columns& columns,
               int64_t state_slot, int64_t tail_page, int64_t tail_rows, int64_t first_row,
               int64_t count, const int64_t* parent) {
    const int64_t W = layer.window, D = layer.conv_dim;
    Scratch& scratch = Scratch::of_thread();
    scratch.reserve(scratch_bytes(W * D * int64_t(sizeof(T)), (W + 1) * 8));
    T* slot = scratch.take<T>(W * D);
    const T** taps = scratch.take<const T*>(W + 1);
    if (tail_rows < W) slot_columns(layer, state_slot, 0, D, slot);
    for (int64_t r = 0; r < count; ++r) {
        int64_t node = r, back = 0;  // back: columns before the first new one
        for (int64_t k = W; k >= 0; --k) {
            if (node >= 0) {
                taps[k] = static_cast<const T*>(columns.xBC) +
                          (first_row + node) * columns.xBC_stride;
                node = parent[node];
                continue;
            }
            const int64_t row = tail_rows - ++back;
            taps[k] = row >= 0 ? tail_column<T>(layer, tail_page, row) : slot + (row + W) * D;
        }
        T* out = static_cast<T*>(columns.out) + (first_row + r) * columns.out_stride;
        conv_span(conv, D, W + 1, taps, 0, 0, D, out);
    }
}

template <class T>
void conv_row(const sf_layer& layer, const sf_conv& conv, const sf_decode_plan& plan,
              const sf_columns& columns, int64_t threads) {
    const int64_t root = -1;
    const int64_t operations = plan.num_rows * layer.conv_dim * CONV_OPERATIONS;
    parallel(plan.num_rows, threads, operations, [&](int64_t row) {
        if (plan.state_slot[row] < 0) return;
        const int64_t page = plan.tail_page[row], tail_row = plan.tail_row[row];
        conv_rows<T>(layer, conv, columns, plan.state_slot[row], page, tail_row, row, 1, &root);
        T* to = static_cast<T*>(layer.tail_xBC) + page * layer.tail_xBC_stride +
                tail_row * layer.conv_dim;
        std::memcpy(to, static_cast<const T*>(columns.xBC) + row * columns.xBC_stride,
                    size_t(layer.conv_dim) * sizeof(T));
    });
}

template <class T>
void conv_verify(const sf_layer& layer, const sf_conv& conv, const sf_verify_plan& plan,
                 const sf_columns& columns, const sf_drafts& drafts, int64_t threads) {
    const int64_t rows = plan.first_node[plan.num_sequences];
    parallel(plan.num_sequences, threads, rows * layer.conv_dim * CONV_OPERATIONS, [&](int64_t i) {
        const int64_t first = plan.first_node[i], count = plan.first_node[i + 1] - first;
        conv_rows<T>(layer, conv, columns, plan.state_slot[i], plan.tail_page[i],
                     plan.tail_rows[i], first, count, plan.parent + first);
        T* to = static_cast<T*>(drafts.xBC) + plan.draft_page[i] * drafts.xBC_stride;
        for (int64_t r = 0; r < count; ++r)
            std::memcpy(to + r * layer.conv_dim,
                        static_cast<const T*>(columns.xBC) + (first + r) * columns.xBC_stride,
                        size_t(layer.conv_dim) * sizeof(T));
    });
}

}  // namespace sf
