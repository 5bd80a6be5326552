// A few rows of x against a weight that comes from memory: the sums of dot(), at the speed of memory.
//
// Columns of the weight pass by in groups. While all rows meet one group in the nearest cache, the
// next one is asked for, evenly: memory hardly waits for arithmetic. With AVX2 a tile sums
// the lower eight lanes of its sums first and then the upper eight, so that twelve are in flight.
#pragma once

#include "support.h"
#include "tile.h"

namespace sf {

constexpr int STREAM_ROWS = 4, STREAM_MOST_ROWS = 48;
// Of a group. Widened on the way, bf16 needs a register more for each.
template <class T>
constexpr int STREAM_COLS = sizeof(T) == 2 ? 2 : 3;

// A step takes one line of the weight: sixteen fp32 elements, or of 32 bf16 ones the even, then the
// odd. Rows of x are fp32 in that order.
template <class T>
constexpr int STEP_VECTORS = sizeof(T) == 2 ? 2 : 1;

#if defined(SF_AVX2)

constexpr int PARTS = 2;
using Part = __m256;
SF_INLINE Part fma(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
template <int P>
SF_INLINE Part part(const float* p) {
    return _mm256_loadu_ps(p + 8 * P);
}
template <int P>
SF_INLINE void step_parts(const float* p, Part (&to)[1]) {
    to[0] = part<P>(p);
}
template <int P>
SF_INLINE void step_parts(const bf16* p, Part (&to)[2]) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)(p + 16 * P));
    to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    to[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
}
template <int P>
SF_INLINE Part get_part(const F16& sum) {
    return P ? sum.hi : sum.lo;
}
template <int P>
SF_INLINE void put_part(Part value, F16& sum) {
    (P ? sum.hi : sum.lo) = value;
}
// Keeps what was loaded in its register; the compiler would load it R times.
SF_INLINE void keep(Part& value) { asm("" : "+x"(value)); }

#else

constexpr int PARTS = 1;
using Part = F16;
template <int P>
SF_INLINE Part part(const float* p) {
    return load(p);
}
template <int P>
SF_INLINE void step_parts(const float* p, Part (&to)[1]) {
    to[0] = load(p);
}
template <int P>
SF_INLINE void step_parts(const bf16* p, Part (&to)[2]) {
    load_pairs(p, to[0], to[1]);
}
template <int P>
SF_INLINE Part get_part(const F16& sum) {
    return sum;
}
template <int P>
SF_INLINE void put_part(Part value, F16& sum) {
    sum = value;
}
SF_INLINE void keep(Part&) {}

#endif

template <int P, int R, int C, class T>
SF_INLINE void stream_step(const float* a, int64_t lda, const T* b, int64_t ldb,
                           Part (&sums)[R][C]) {
    constexpr int V = STEP_VECTORS<T>;
    Part right[C][V];
    SF_UNROLL
    for (int j = 0; j < C; ++j) {
        step_parts<P>(b + j * ldb, right[j]);
        SF_UNROLL
        for (int v = 0; v < V; ++v)
            if (R > 1) keep(right[j][v]);
    }
    SF_UNROLL
    for (int v = 0; v < V; ++v)
        SF_UNROLL
        for (int i = 0; i < R; ++i) {
            Part left = part<P>(a + i * lda + v * LANES);
            if (C > 1) keep(left);
            SF_UNROLL
            for (int j = 0; j < C; ++j) sums[i][j] = fma(left, right[j][v], sums[i][j]);
        }
}

// Part P of the sums of R rows and C columns, continued. Meanwhile FETCH rows are fetched from
// `ahead`.
template <int P, int R, int C, int FETCH, class T>
SF_INLINE void stream_part(const float* a, int64_t lda, const T* b, int64_t ldb, int64_t depth,
                           const T* ahead, F16 (&result)[R][C]) {
    constexpr int STEP = STEP_VECTORS<T> * LANES;
    Part sums[R][C];
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int j = 0; j < C; ++j) sums[i][j] = get_part<P>(result[i][j]);
    int64_t k = 0;
    for (; k + STEP <= depth; k += STEP) {
        SF_UNROLL
        for (int f = 0; f < FETCH; ++f) __builtin_prefetch(ahead + f * ldb + k);
        stream_step<P>(a + k, lda, b + k, ldb, sums);
    }
    if (k < depth) {
        T rest[C][STEP] = {};
        for (int j = 0; j < C; ++j)
            std::memcpy(rest[j], b + j * ldb + k, size_t(depth - k) * sizeof(T));
        stream_step<P>(a + k, lda, rest[0], STEP, sums);
    }
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int j = 0; j < C; ++j) put_part<P>(sums[i][j], result[i][j]);
}

// out[i][j] = sum(sums[i][j]), four rows at once.
template <int R, int C>
SF_INLINE void stream_sums(const F16 (&sums)[R][C], float* out, int64_t ldo) {
    if constexpr (R == 4 && C != 2) {
        SF_UNROLL
        for (int j = 0; j < C; ++j) {
            float four[4];
            sum4(sums[0][j], sums[1][j], sums[2][j], sums[3][j], four);
            SF_UNROLL
            for (int i = 0; i < 4; ++i) out[i * ldo + j] = four[i];
        }
    } else {
        store_sums(sums, out, ldo);
    }
}

// Elements along which a group and several rows fit the nearest cache together.
constexpr int64_t STREAM_RUN = 768;

// Tile number `tile` of the rows against a run of a group of C columns. It fetches its share of the
// next group's.
template <int R, int C, class T>
__attribute__((noinline)) void stream_tile(const float* a, int64_t lda, const T* b, int64_t ldb,
                                           int64_t run, int64_t tile, int64_t passes,
                                           F16 (&sums)[R][C]) {
    const int64_t pass = tile * PARTS;
    const T* next = b + C * ldb;
    if (passes >= C) {
        stream_part<0, R, C, 1>(a, lda, b, ldb, run, next + pass * C / passes * ldb, sums);
        if constexpr (PARTS == 2)
            stream_part<1, R, C, 1>(a, lda, b, ldb, run, next + (pass + 1) * C / passes * ldb,
                                    sums);
    } else {
        constexpr int SHARE = (C + PARTS - 1) / PARTS;
        stream_part<0, R, C, SHARE>(a, lda, b, ldb, run, next, sums);
        if constexpr (PARTS == 2)
            stream_part<1, R, C, SHARE>(a, lda, b, ldb, run, next + (C - SHARE) * ldb, sums);
    }
}

// How many of the rows left the next tile takes: none is left alone, its sums would wait for each
// other.
inline int stream_rows(int64_t left) {
    if (left == 5) return 3;
    return left < STREAM_ROWS ? int(left) : STREAM_ROWS;
}

// Calls tile.operator()<R>(first, number) for the tiles of the rows.
template <class Tile>
inline void stream_tiles(int64_t rows, const Tile& tile) {
    for (int64_t i = 0, number = 0; i < rows; ++number) {
        const int count = stream_rows(rows - i);
        if (count == 4)
            tile.template operator()<4>(i, number);
        else if (count == 3)
            tile.template operator()<3>(i, number);
        else if (count == 2)
            tile.template operator()<2>(i, number);
        else
            tile.template operator()<1>(i, number);
        i += count;
    }
}

template <int C, class T>
inline void stream_group(const float* a, int64_t lda, int64_t rows, const T* b, int64_t ldb,
                         int64_t depth, float* out, int64_t ldo) {
    const int64_t passes = ceil_div(rows, STREAM_ROWS) * PARTS;
    F16 sums[STREAM_MOST_ROWS][C];
    for (int64_t i = 0; i < rows; ++i)
        for (int j = 0; j < C; ++j) sums[i][j] = zero();
    for (int64_t k = 0; k < depth; k += STREAM_RUN) {
        const int64_t run = depth - k < STREAM_RUN ? depth - k : STREAM_RUN;
        stream_tiles(rows, [&]<int R>(int64_t i, int64_t tile) {
            stream_tile<R, C>(a + i * lda + k, lda, b + k, ldb, run, tile, passes,
                              *reinterpret_cast<F16(*)[R][C]>(sums + i));
        });
    }
    stream_tiles(rows, [&]<int R>(int64_t i, int64_t) {
        stream_sums(*reinterpret_cast<const F16(*)[R][C]>(sums + i), out + i * ldo, ldo);
    });
}

// out (rows, cols) = a (rows, depth) @ b (cols, depth).T, two rows or more, at most
// STREAM_MOST_ROWS. Rows of a hold whole steps, with zeros after the last element. What follows b is
// fetched as well: its next columns.
template <class T>
inline void stream_dot(const float* a, int64_t lda, int64_t rows, const T* b, int64_t ldb,
                       int64_t cols, int64_t depth, float* out, int64_t ldo) {
    constexpr int C = STREAM_COLS<T>;
    int64_t j = 0;
    for (; j + C <= cols; j += C)
        stream_group<C>(a, lda, rows, b + j * ldb, ldb, depth, out + j, ldo);
    for (; j < cols; ++j)
        stream_group<1>(a, lda, rows, b + j * ldb, ldb, depth, out + j, ldo);
}

}  // namespace sf
