// A head's state turned: how the chunk scan carries it from chunk to chunk.
//
// Sixteen of headdim lie in lanes, in *panels* of (dstate, 16). So C . S needs no exchange between
// lanes, and the fold leaves S' as the next chunk wants it. What meets the panels lies in *strips*:
// R rows side by side, (depth, R), in the order in which a tile reads them. The bits are those of
// dot() and of fold().
#pragma once

#include "panel.h"

namespace sf {

#if defined(SF_AVX512)
constexpr int DOT_STRIP = 6;
#else
// Eight registers of sums, so that finished lanes need not all go to the stack.
constexpr int DOT_STRIP = 4;
#endif
constexpr int FOLD_STRIP = 6;

// Calls tile.operator()<R>(i) for strips of rows i, i + 1, .. that together are [0, rows); R is MOST
// but for the last ones.
template <int MOST, class Tile>
inline void strips(int64_t rows, const Tile& tile) {
    int64_t i = 0;
    // Two fours are done before a six and a two: so few sums as in a two wait for each other.
    if constexpr (MOST == 6)
        for (; rows - i >= 6 && rows - i != 8; i += 6) tile.template operator()<6>(i);
    for (; rows - i >= 4; i += 4) tile.template operator()<4>(i);
    for (; rows - i >= 2; i += 2) tile.template operator()<2>(i);
    if (i < rows) tile.template operator()<1>(i);
}

// Calls tile.operator()<V>(j) for panels j, j + 1, .. that together are [0, panels).
template <class Tile>
inline void panels_at_once(int64_t panels, const Tile& tile) {
    int64_t j = 0;
    for (; j + PANELS <= panels; j += PANELS) tile.template operator()<PANELS>(j);
    for (; j < panels; ++j) tile.template operator()<1>(j);
}

// rows (count, depth), ld apart, as strips: rows i .. of a strip at i * depth.
inline void strips_of_rows(const float* rows, int64_t ld, int64_t count, int64_t depth, float* to) {
    strips<DOT_STRIP>(count, [&]<int R>(int64_t first) {
        const float* from = rows + first * ld;
        float* strip = to + first * depth;
        for (int64_t k = 0; k < depth; ++k)
            SF_UNROLL
            for (int i = 0; i < R; ++i) strip[k * R + i] = from[i * ld + k];
    });
}

// The columns of rows (length, count), ld apart, as strips.
inline void strips_of_columns(const float* rows, int64_t ld, int64_t length, int64_t count,
                              float* to) {
    strips<FOLD_STRIP>(count, [&]<int R>(int64_t first) {
        float* strip = to + first * length;
        for (int64_t s = 0; s < length; ++s)
            SF_UNROLL
            for (int i = 0; i < R; ++i) strip[s * R + i] = rows[s * ld + first + i];
    });
}

// rows (count, depth), ld apart, turned: panels (depth rounded up, 16), what is missing is zero.
template <class T>
inline void turn_rows(const T* rows, int64_t ld, int64_t count, int64_t depth, float* panels) {
    alignas(64) float block[LANES * LANES];
    const int64_t padded = round_up(depth);
    for (int64_t r = 0; r < count; r += LANES, panels += padded * LANES)
        for (int64_t k = 0; k < padded; k += LANES) {
            float* to[LANES];
            for (int l = 0; l < LANES; ++l) to[l] = panels + (k + l) * LANES;
            // The next rows, in the order in which they lie.
            for (int i = 0; i < LANES; ++i)
                __builtin_prefetch(rows + (r + LANES) * ld + k * LANES + i * (64 / sizeof(T)));
            square(rows + r * ld + k, ld, count - r, depth - k, block);
            turn(block, LANES, to);
        }
}

// Up to a line of memory: n elements of T.
template <class T>
constexpr int LINE = 64 / int(sizeof(T));
template <class T>
SF_INLINE void store_line(T* to, const float* from, int64_t n) {
    if constexpr (sizeof(T) == 4)
        if (n >= LINE<T> && reinterpret_cast<uintptr_t>(to) % 64 == 0)
            return store_past(to, load(from));
    for (int64_t k = 0; k < LINE<T> && k < n; k += LANES) store_upto(to + k, load(from + k), n - k);
}

// And back: rows (count, depth) from their panels. A line at a time and past the caches, where it
// would have to be read before it is written. To be followed by fence_stores().
template <class T>
inline void turn_back(const float* panels, int64_t count, int64_t depth, T* rows) {
    constexpr int WIDTH = LINE<T>;
    alignas(64) float block[LANES * WIDTH];
    const int64_t padded = round_up(depth);
    for (int64_t r = 0; r < count; r += LANES, panels += padded * LANES)
        for (int64_t k = 0; k < depth; k += WIDTH) {
            for (int64_t part = 0; part < WIDTH && k + part < padded; part += LANES) {
                float* to[LANES];
                for (int l = 0; l < LANES; ++l) to[l] = block + l * WIDTH + part;
                turn(panels + (k + part) * LANES, LANES, to);
            }
            for (int64_t i = 0; i < LANES && r + i < count; ++i)
                store_line(rows + (r + i) * depth + k, block + i * WIDTH, depth - k);
        }
}

// Lanes TREE_ORDER[leaf], .. of dot()'s partial sums, LEAVES of them, added as its tree adds them.
template <int LEAVES, int R, int V>
SF_INLINE void turned_lanes(int leaf, const float* strip, const float* panels, int64_t next,
                            int64_t depth, F16 (&sums)[R][V]) {
    if constexpr (LEAVES == 1) {
        SF_UNROLL
        for (int i = 0; i < R; ++i)
            SF_UNROLL
            for (int v = 0; v < V; ++v) sums[i][v] = zero();
        for (int64_t k = TREE_ORDER[leaf]; k < depth; k += LANES) {
            F16 right[V];
            SF_UNROLL
            for (int v = 0; v < V; ++v) right[v] = load(panels + k * LANES + v * next);
            SF_UNROLL
            for (int i = 0; i < R; ++i) {
                F16 left = set1(strip[k * R + i]);
                SF_UNROLL
                for (int v = 0; v < V; ++v) sums[i][v] = fma(left, right[v], sums[i][v]);
            }
        }
    } else {
        F16 before[R][V];
        turned_lanes<LEAVES / 2>(leaf, strip, panels, next, depth, before);
        turned_lanes<LEAVES / 2>(leaf + LEAVES / 2, strip, panels, next, depth, sums);
        SF_UNROLL
        for (int i = 0; i < R; ++i)
            SF_UNROLL
            for (int v = 0; v < V; ++v) sums[i][v] = add(before[i][v], sums[i][v]);
    }
}

// out (R, 16 V), rows ldo apart = a strip (depth, R) against V panels, which are `next` apart; depth
// in whole vectors. The sums of dot().
template <int R, int V>
__attribute__((noinline)) void turned_dot(const float* strip, const float* panels, int64_t next,
                                          int64_t depth, float* out, int64_t ldo) {
    F16 sums[R][V];
    turned_lanes<LANES>(0, strip, panels, next, depth, sums);
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int v = 0; v < V; ++v) store(out + i * ldo + v * LANES, sums[i][v]);
}

// As a state of type ST would hold it.
template <class ST>
SF_INLINE F16 held_as(F16 a) {
    if constexpr (sizeof(ST) == 4) return a;
    ST narrow[LANES];
    store(narrow, a);
    return load(narrow);
}

// S' in place of S, R of dstate of V panels that are `next` apart. x: weight * input in panels of
// (length, 16) that are next_x apart; B a strip (length, R).
template <class ST, int R, int V>
__attribute__((noinline)) void turned_fold(float* state, int64_t next, float decay, const float* x,
                                           int64_t next_x, const float* B, int64_t length) {
    F16 sums[R][V];
    F16 remains = set1(decay);
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int v = 0; v < V; ++v)
            sums[i][v] = mul(remains, load(state + i * LANES + v * next));
    combine_tile<R, V>(B, 1, R, x, LANES, next_x, length, sums);
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int v = 0; v < V; ++v)
            store(state + i * LANES + v * next, held_as<ST>(sums[i][v]));
}

}  // namespace sf
