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

#if defined(SF_AVX2)

// One step of a tile, half a vector after the other: so three registers are enough beside the sums.
// The empty assembly keeps what was loaded in its register; the compiler would load it R or C times.
template <int R, int C, __m256 F16::*HALF>
SF_INLINE void dot_half(const F16 (&left)[R], const F16 (&right)[C], F16 (&sums)[R][C]) {
    __m256 columns[C];
    SF_UNROLL
    for (int j = 0; j < C; ++j) {
        columns[j] = right[j].*HALF;
        if (R > 1) asm("" : "+x"(columns[j]));
    }
    SF_UNROLL
    for (int i = 0; i < R; ++i) {
        __m256 row = left[i].*HALF;
        if (C > 1) asm("" : "+x"(row));
        SF_UNROLL
        for (int j = 0; j < C; ++j)
            sums[i][j].*HALF = _mm256_fmadd_ps(row, columns[j], sums[i][j].*HALF);
    }
}
template <int R, int C>
SF_INLINE void dot_step(const F16 (&left)[R], const F16 (&right)[C], F16 (&sums)[R][C]) {
    dot_half<R, C, &F16::lo>(left, right, sums);
    dot_half<R, C, &F16::hi>(left, right, sums);
}

#else

template <int R, int C>
SF_INLINE void dot_step(const F16 (&left)[R], const F16 (&right)[C], F16 (&sums)[R][C]) {
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int j = 0; j < C; ++j) sums[i][j] = fma(left[i], right[j], sums[i][j]);
}

#endif

// Elements ahead of which b is fetched where it comes from memory: the processor alone does not ask
// for enough of it at once.
constexpr int64_t DOT_AHEAD = 1024;

// AHEAD when b comes from memory, row after row.
template <int R, int C, bool AHEAD, class TA, class TB>
__attribute__((noinline)) void dot_tile(const TA* a, int64_t lda, const TB* b, int64_t ldb, int64_t depth,
                     float* out, int64_t ldo) {
    F16 sums[R][C], left[R], right[C];
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int j = 0; j < C; ++j) sums[i][j] = zero();
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        SF_UNROLL
        for (int j = 0; j < C; ++j) {
            if (AHEAD) __builtin_prefetch(b + j * ldb + k + DOT_AHEAD);
            right[j] = load(b + j * ldb + k);
        }
        SF_UNROLL
        for (int i = 0; i < R; ++i) left[i] = load(a + i * lda + k);
        dot_step(left, right, sums);
    }
    if (k < depth) {
        const int rest = int(depth - k);
        SF_UNROLL
        for (int j = 0; j < C; ++j) right[j] = load_n(b + j * ldb + k, rest);
        SF_UNROLL
        for (int i = 0; i < R; ++i) left[i] = load_n(a + i * lda + k, rest);
        dot_step(left, right, sums);
    }
    store_sums(sums, out, ldo);
}

// How many of the rows left the next tile takes: none is so small that its sums wait for each other.
inline int next_rows(int64_t left) {
    if (DOT_ROWS == 6 && left >= 6) return 6;
    if (left == 3 || left >= 5) return 3;
    return left >= 2 ? 2 : 1;
}
template <class Tile>
inline void with_rows(int rows, const Tile& tile) {
    if (rows == DOT_ROWS)
        tile.template operator()<DOT_ROWS>();
    else if (rows == 3)
        tile.template operator()<3>();
    else if (rows == 2)
        tile.template operator()<2>();
    else
        tile.template operator()<1>();
}

// Rows [0, R) against columns [0, cols).
template <int R, bool AHEAD, class TA, class TB>
inline void dot_rows(const TA* a, int64_t lda, const TB* b, int64_t ldb, int64_t cols,
                     int64_t depth, float* out, int64_t ldo) {
    // A single row leaves registers for more columns; but from memory one line after the other comes
    // fastest.
    constexpr int C = R > 1 ? DOT_COLS : AHEAD ? 1 : 4;
    int64_t j = 0;
    for (; j + C <= cols; j += C)
        dot_tile<R, C, AHEAD>(a, lda, b + j * ldb, ldb, depth, out + j, ldo);
    for (; j < cols; ++j) dot_tile<R, 1, AHEAD>(a, lda, b + j * ldb, ldb, depth, out + j, ldo);
}

// out (rows, cols) = a (rows, depth) @ b (cols, depth).T. AHEAD when b comes from memory.
template <bool AHEAD = false, class TA, class TB>
inline void dot(const TA* a, int64_t lda, int64_t rows, const TB* b, int64_t ldb, int64_t cols,
                int64_t depth, float* out, int64_t ldo) {
    for (int64_t i = 0; i < rows;) {
        const int count = next_rows(rows - i);
        with_rows(count, [&]<int R>() {
            dot_rows<R, AHEAD>(a + i * lda, lda, b, ldb, cols, depth, out + i * ldo, ldo);
        });
        i += count;
    }
}

// The same where b is large: each of its rows passes by once, and all of a meets it there.
template <class TA, class TB>
inline void dot_streamed(const TA* a, int64_t lda, int64_t rows, const TB* b, int64_t ldb,
                         int64_t cols, int64_t depth, float* out, int64_t ldo) {
    if (rows == 1) return dot<true>(a, lda, rows, b, ldb, cols, depth, out, ldo);
    for (int64_t j = 0; j < cols; j += DOT_COLS) {
        const int64_t count = cols - j < DOT_COLS ? cols - j : DOT_COLS;
        for (int64_t i = 0; i < rows;) {
            const int few = next_rows(rows - i);
            with_rows(few, [&]<int R>() {
                const TA* from = a + i * lda;
                float* to = out + i * ldo + j;
                if (i == 0)
                    dot_rows<R, true>(from, lda, b + j * ldb, ldb, count, depth, to, ldo);
                else
                    dot_rows<R, false>(from, lda, b + j * ldb, ldb, count, depth, to, ldo);
            });
            i += few;
        }
    }
}

// sums[i][v] += sum over k, ascending, of a(i, k) b_v(k). a(i, k) = a[i * row_step + k * depth_step];
// b_v(k) is the vector at b + k * ldb + v * next.
template <int R, int V, class T>
SF_INLINE void combine_tile(const float* a, int64_t row_step, int64_t depth_step, const T* b,
                            int64_t ldb, int64_t next, int64_t depth, F16 (&sums)[R][V]) {
    for (int64_t k = 0; k < depth; ++k) {
        F16 right[V];
        SF_UNROLL
        for (int v = 0; v < V; ++v) right[v] = load(b + k * ldb + v * next);
        SF_UNROLL
        for (int i = 0; i < R; ++i) {
            F16 left = set1(a[i * row_step + k * depth_step]);
            SF_UNROLL
            for (int v = 0; v < V; ++v) sums[i][v] = fma(left, right[v], sums[i][v]);
        }
    }
}

}  // namespace sf
