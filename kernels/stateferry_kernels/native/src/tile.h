// The two inner loops that all matrix work here is made of.
//
//   dot      out[i][j] = sum over k of a[i][k] b[j][k]: both contiguous along k, sixteen partial
//            sums along k, then their tree.
//   combine  out[i][:] += sum over k of a(i, k) b[k][:], k in ascending order, one fused step each.
//
// A row's bits depend on its operands alone, whatever the tile: the tile only says how many sums are
// in flight at once. So a single decode row and a block of prefill rows agree.
#pragma once

#include "simd.h"

namespace sf {

#if defined(SF_AVX512)
constexpr int DOT_ROWS = 6, DOT_COLS = 4;
constexpr int COMBINE_ROWS = 6, COMBINE_VECTORS = 2;
#else
// Twelve registers of sums, of sixteen.
constexpr int DOT_ROWS = 3, DOT_COLS = 2;
constexpr int COMBINE_ROWS = 6, COMBINE_VECTORS = 1;
#endif

template <int R, int C, class TA, class TB>
inline void dot_tile(const TA* a, int64_t lda, const TB* b, int64_t ldb, int64_t depth,
                     float* out, int64_t ldo) {
    F16 sums[R][C];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) sums[i][j] = zero();
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        F16 right[C];
        for (int j = 0; j < C; ++j) right[j] = load(b + j * ldb + k);
        for (int i = 0; i < R; ++i) {
            F16 left = load(a + i * lda + k);
            for (int j = 0; j < C; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
        }
    }
    if (k < depth) {
        int rest = int(depth - k);
        F16 right[C];
        for (int j = 0; j < C; ++j) right[j] = load_n(b + j * ldb + k, rest);
        for (int i = 0; i < R; ++i) {
            F16 left = load_n(a + i * lda + k, rest);
            for (int j = 0; j < C; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
        }
    }
    for (int i = 0; i < R; ++i) {
        int j = 0;
        for (; j + 4 <= C; j += 4)
            sum4(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3], out + i * ldo + j);
        for (; j < C; ++j) out[i * ldo + j] = sum(sums[i][j]);
    }
}

// Rows [0, R) against columns [0, cols).
template <int R, class TA, class TB>
inline void dot_rows(const TA* a, int64_t lda, const TB* b, int64_t ldb, int64_t depth,
                     int64_t cols, float* out, int64_t ldo) {
    // A single row leaves registers for more columns.
    constexpr int C = R == 1 ? 4 : DOT_COLS;
    int64_t j = 0;
    for (; j + C <= cols; j += C) dot_tile<R, C>(a, lda, b + j * ldb, ldb, depth, out + j, ldo);
    for (; j < cols; ++j) dot_tile<R, 1>(a, lda, b + j * ldb, ldb, depth, out + j, ldo);
}

template <class TA, class TB>
inline void dot(const TA* a, int64_t lda, int64_t rows, const TB* b, int64_t ldb, int64_t cols,
                int64_t depth, float* out, int64_t ldo) {
    int64_t i = 0;
    for (; i + DOT_ROWS <= rows; i += DOT_ROWS)
        dot_rows<DOT_ROWS>(a + i * lda, lda, b, ldb, depth, cols, out + i * ldo, ldo);
    for (; i + 2 <= rows; i += 2)
        dot_rows<2>(a + i * lda, lda, b, ldb, depth, cols, out + i * ldo, ldo);
    if (i < rows) dot_rows<1>(a + i * lda, lda, b, ldb, depth, cols, out + i * ldo, ldo);
}

// a(i, k) = a[i * row_step + k * depth_step]; b rows are padded to whole vectors.
template <int R, int V>
inline void combine_tile(const float* a, int64_t row_step, int64_t depth_step, const float* b,
                         int64_t ldb, int64_t depth, F16 (&sums)[R][V]) {
    for (int64_t k = 0; k < depth; ++k) {
        F16 right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + k * ldb + v * LANES);
        for (int i = 0; i < R; ++i) {
            F16 left = set1(a[i * row_step + k * depth_step]);
            for (int v = 0; v < V; ++v) sums[i][v] = fma(left, right[v], sums[i][v]);
        }
    }
}

}  // namespace sf
