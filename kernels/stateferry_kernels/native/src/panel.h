// The sums of dot() for many rows at once: columns in lanes instead of elements.
//
// dot() ends every sum with an exchange between lanes, and loads two operands for each product. With
// enough rows it pays to turn b first: a *panel* holds sixteen of its rows, element by element. Lane
// l's partial sum of dot() is then a run of steps, and the tree over lanes is additions of whole
// vectors. Elements lie in the order in which that tree, walked depth first, wants them, so that the
// stack of finished branches is four deep. The bits are those of dot().
#pragma once

#include "tile.h"

namespace sf {

#if defined(SF_AVX512)
constexpr int PANELS = 2;
#else
constexpr int PANELS = 1;
#endif

// The tree adds lane l to l + 8, then to l + 4, and so on: its leaves are in bit-reversed order.
constexpr int TREE_ORDER[LANES] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

#if defined(SF_AVX512) || defined(SF_AVX2)

SF_INLINE void turn8(const float* from, int64_t ld, float* const* to) {
    __m256 row[8], pair[8], four[8];
    SF_UNROLL
    for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * ld);
    SF_UNROLL
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    SF_UNROLL
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    SF_UNROLL
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to[i], _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_storeu_ps(to[i + 4], _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}

// from (16, 16), rows ld apart; column l goes to to[l], sixteen elements.
SF_INLINE void turn(const float* from, int64_t ld, float* const (&to)[LANES]) {
    float* right[LANES];
    for (int l = 0; l < LANES; ++l) right[l] = to[l] + 8;
    turn8(from, ld, to);
    turn8(from + 8, ld, to + 8);
    turn8(from + 8 * ld, ld, right);
    turn8(from + 8 * ld + 8, ld, right + 8);
}

#else

SF_INLINE void turn(const float* from, int64_t ld, float* const (&to)[LANES]) {
    for (int l = 0; l < LANES; ++l)
        for (int i = 0; i < LANES; ++i) to[l][i] = from[i * ld + l];
}

#endif

// Up to sixteen rows of up to sixteen elements, as fp32 with zeros around them.
template <class T>
SF_INLINE void square(const T* from, int64_t ld, int64_t rows, int64_t n, float* to) {
    for (int i = 0; i < LANES; ++i)
        store(to + i * LANES, i < rows ? load_upto(from + i * ld, n) : zero());
}

// Elements per lane of rows of this depth.
constexpr int64_t panel_runs(int64_t depth) { return (depth + LANES - 1) / LANES; }
// Floats of a panel, and of a row that meets it.
constexpr int64_t panel_size(int64_t depth) { return panel_runs(depth) * LANES * LANES; }
constexpr int64_t panel_row_size(int64_t depth) { return panel_runs(depth) * LANES; }

// One panel of b (columns <= 16, depth); what is missing is zero.
template <class T>
inline void pack_panel(const T* b, int64_t ldb, int64_t columns, int64_t depth, float* panel) {
    const int64_t runs = panel_runs(depth);
    alignas(64) float block[LANES * LANES];
    for (int64_t m = 0; m < runs; ++m) {
        float* to[LANES];
        for (int i = 0; i < LANES; ++i) to[TREE_ORDER[i]] = panel + (i * runs + m) * LANES;
        square(b + m * LANES, ldb, columns, depth - m * LANES, block);
        turn(block, LANES, to);
    }
}

// A row of a in the order of the panels' elements.
template <class T>
inline void pack_row(const T* a, int64_t depth, float* row) {
    const int64_t runs = panel_runs(depth);
    for (int i = 0; i < LANES; ++i)
        for (int64_t m = 0, k = TREE_ORDER[i]; m < runs; ++m, k += LANES)
            *row++ = k < depth ? widen(a[k]) : 0.0f;
}

// result[i][v] = row i of a against the sixteen columns of panel v; panels lie one after the other.
//
// LEAVES lanes are summed at a time: one with many rows loads least; two neighbours of the tree with
// half as many rows halve what goes to its stack, which is what counts when rows are short.
template <int LEAVES, int R, int V>
SF_INLINE void panel_tile(const float* a, int64_t lda, const float* panel, int64_t runs,
                          F16 (&result)[R][V]) {
    constexpr int DEPTH = LEAVES == 2 ? 3 : 4;
    F16 branches[DEPTH][R][V];
    const int64_t next = runs * LANES * LANES;
    for (int leaf = 0; leaf < LANES / LEAVES; ++leaf) {
        F16 sums[LEAVES][R][V];
        SF_UNROLL
        for (int e = 0; e < LEAVES; ++e)
            SF_UNROLL
            for (int i = 0; i < R; ++i)
                SF_UNROLL
                for (int v = 0; v < V; ++v) sums[e][i][v] = zero();
        for (int64_t m = 0; m < runs; ++m) {
            SF_UNROLL
            for (int e = 0; e < LEAVES; ++e) {
                F16 right[V];
                SF_UNROLL
                for (int v = 0; v < V; ++v) right[v] = load(panel + e * runs * LANES + v * next);
                SF_UNROLL
                for (int i = 0; i < R; ++i) {
                    F16 left = set1(a[i * lda + e * runs]);
                    SF_UNROLL
                    for (int v = 0; v < V; ++v)
                        sums[e][i][v] = fma(left, right[v], sums[e][i][v]);
                }
            }
            panel += LANES;
            ++a;
        }
        panel += (LEAVES - 1) * runs * LANES;
        a += (LEAVES - 1) * runs;
        SF_UNROLL
        for (int i = 0; i < R; ++i)
            SF_UNROLL
            for (int v = 0; v < V; ++v)
                if (LEAVES == 2) sums[0][i][v] = add(sums[0][i][v], sums[LEAVES - 1][i][v]);
        int level = 0;
        for (; leaf >> level & 1; ++level)
            SF_UNROLL
            for (int i = 0; i < R; ++i)
                SF_UNROLL
                for (int v = 0; v < V; ++v)
                    sums[0][i][v] = add(branches[level][i][v], sums[0][i][v]);
        F16(&to)[R][V] = level < DEPTH ? branches[level] : result;
        SF_UNROLL
        for (int i = 0; i < R; ++i)
            SF_UNROLL
            for (int v = 0; v < V; ++v) to[i][v] = sums[0][i][v];
    }
}

// Calls tile.operator()<R>(i) for tiles of rows i, i + 1, .. that together are [0, rows).
template <class Tile>
inline void tiles_of_six(int64_t rows, const Tile& tile) {
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6) tile.template operator()<6>(i);
    for (; i + 3 <= rows; i += 3) tile.template operator()<3>(i);
    for (; i < rows; ++i) tile.template operator()<1>(i);
}

}  // namespace sf
