// One head's part of one grid interval: what prefill, decode, verification and commit all evaluate.
//
// With S the state at the interval's start and c the running sum of dt * A from there,
//     y_t = exp(c_t) (S C_t) + sum over s <= t of (C_t . B_s) exp(c_t - c_s) dt_s x_s + D x_t
//     S'  = exp(c_L) S + sum over s of exp(c_L - c_s) dt_s x_s B_s
// each sum in one order: S C_t by dot(), the sums over s ascending, D and the gate last.
#pragma once

#include "abi.h"
#include "elementwise.h"
#include "tile.h"

namespace sf {

// dt (heads,) raw -> bias, softplus, clamp, for heads [begin, end).
template <class T>
inline void process_dt(const T* raw, int64_t begin, int64_t end, const sf_params& params,
                       float* to) {
    for (int64_t h = begin; h < end; h += LANES) {
        int64_t n = end - h;
        F16 dt = load_upto(raw + h, n);
        if (params.dt_bias) dt = add(dt, load_upto(params.dt_bias + h, n));
        if (params.dt_softplus) dt = softplus(dt);
        dt = min(set1(float(params.dt_max)), max(set1(float(params.dt_min)), dt));
        store_upto(to + h - begin, dt, n);
    }
}

inline void process_dt(const void* raw, int64_t dtype, int64_t begin, int64_t end,
                       const sf_params& params, float* to) {
    if (dtype == SF_BFLOAT16)
        process_dt(static_cast<const bf16*>(raw), begin, end, params, to);
    else
        process_dt(static_cast<const float*>(raw), begin, end, params, to);
}

// The next value of the running sum.
inline float next_cumsum(float before, float dt, float A) { return __builtin_fmaf(dt, A, before); }

// weights[s] = CB[s] exp(c_t - c[s]) dt[s] for s < n; arrays padded to whole vectors.
inline void row_weights(const float* CB, const float* c, const float* dt, float c_t, int64_t n,
                        float* weights) {
    F16 newest = set1(c_t);
    for (int64_t s = 0; s < n; s += LANES) {
        F16 decay = exp(sub(newest, load(c + s)));
        store(weights + s, mul(mul(load(CB + s), decay), load(dt + s)));
    }
}

// weights[s] = exp(c_last - c[s]) dt[s] for s < n; arrays padded to whole vectors.
inline void fold_weights(const float* c, const float* dt, int64_t n, float* weights) {
    F16 last = set1(c[n - 1]);
    for (int64_t s = 0; s < n; s += LANES)
        store(weights + s, mul(exp(sub(last, load(c + s))), load(dt + s)));
}

// Sixteen elements of an output, stored in the activation dtype.
template <class T>
SF_INLINE void finish(F16 within, F16 before, float grown, const float* D, F16 x, const T* z,
                   int64_t n, T* out) {
    F16 y = fma(set1(grown), before, within);
    if (D) y = fma(set1(*D), x, y);
    if (z) y = mul(y, silu(load_upto(z, n)));
    store_upto(out, y, n);
}

template <int R, int V, class ST>
inline void fold_tile(const ST* state, int64_t N, int64_t n, float decay, const float* x,
                      int64_t ldx, const float* B, int64_t ldb, int64_t length, ST* next) {
    F16 sums[R][V];
    F16 remains = set1(decay);
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int v = 0; v < V; ++v)
            sums[i][v] = mul(remains, load_upto(state + i * N + v * LANES, n - v * LANES));
    combine_tile<R, V>(x, 1, ldx, B, ldb, LANES, length, sums);
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int v = 0; v < V; ++v)
            store_upto(next + i * N + v * LANES, sums[i][v], n - v * LANES);
}

template <int R, class ST>
inline void fold_rows(const ST* state, int64_t N, float decay, const float* x, int64_t ldx,
                      const float* B, int64_t ldb, int64_t length, ST* next) {
    constexpr int V = COMBINE_VECTORS;
    int64_t n = 0;
    for (; n + V * LANES <= N; n += V * LANES)
        fold_tile<R, V>(state + n, N, V * LANES, decay, x, ldx, B + n, ldb, length, next + n);
    for (; n < N; n += LANES)
        fold_tile<R, 1>(state + n, N, N - n, decay, x, ldx, B + n, ldb, length, next + n);
}

// S' (P, N) from S, into the same place or another. x (length, ldx) holds weight * input and B
// (length, ldb) the inputs, both fp32, rows padded to whole vectors.
template <class ST>
inline void fold(const ST* state, int64_t P, int64_t N, float decay, const float* x, int64_t ldx,
                 const float* B, int64_t ldb, int64_t length, ST* next) {
    int64_t p = 0;
    for (; p + COMBINE_ROWS <= P; p += COMBINE_ROWS)
        fold_rows<COMBINE_ROWS>(state + p * N, N, decay, x + p, ldx, B, ldb, length, next + p * N);
    for (; p + 4 <= P; p += 4)
        fold_rows<4>(state + p * N, N, decay, x + p, ldx, B, ldb, length, next + p * N);
    for (; p + 2 <= P; p += 2)
        fold_rows<2>(state + p * N, N, decay, x + p, ldx, B, ldb, length, next + p * N);
    if (p < P) fold_rows<1>(state + p * N, N, decay, x + p, ldx, B, ldb, length, next + p * N);
}

// A row as fp32, padded with zeros to whole vectors; times weight where one is given.
template <class T>
inline void widen_row(const T* row, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += LANES) store(to + i, load_upto(row + i, n - i));
}
template <class T>
inline void widen_row(const T* row, int64_t n, float weight, float* to) {
    F16 w = set1(weight);
    for (int64_t i = 0; i < n; i += LANES) store(to + i, mul(w, load_upto(row + i, n - i)));
}

}  // namespace sf
