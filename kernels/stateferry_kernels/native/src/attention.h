// Causal grouped-query attention over paged keys and values.
//
// A row at position p walks keys 0 .. p in blocks of KEY_BLOCK from position 0. Per block: scores by
// dot() times scale, their maximum, weights exp(score - highest so far), and
//     total = total exp(before - highest) + sum of weights     sixteen partial sums, then their tree
//     acc   = acc   exp(before - highest) + sum of weight * value       keys ascending, one fma each
// and in the end acc / total. That depends on the row and its keys alone: not on the rows beside it,
// nor on whether keys were read in place (few rows) or turned into panels first (many).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tile.h"

#include "elementwise.h"
#include "packed_abi.h"
#include "panel.h"
#include "support.h"

namespace sf {

constexpr int64_t KEY_BLOCK = 64;
constexpr int TILE = 6;
#if defined(SF_AVX512)
constexpr int SCORE_ROWS = 6;
#else
constexpr int SCORE_ROWS = 3;
#endif
// Up to this many rows keys and values are read where they lie; beyond, copying them pays.
constexpr int64_t FEW_ROWS = 24;
// Rows (tokens times heads of a group) that share one pass over the keys.
constexpr int64_t ROW_BLOCK = 192;

// One task: tokens [first, first + count) of a sequence, all query heads that share a key head.
struct AttentionTask {
    int64_t sequence, head, first, count;
};

// What a task's rows have gathered so far; row = token * group + head of the group.
struct AttentionRows {
    int64_t group, start, dim, width;  // start: position of the first token; width: dim, padded
    float scale;
    float* q;        // (rows, width), in the order of panels where keys are packed
    float* acc;      // (rows, width)
    float* highest;  // (rows,)
    float* total;    // (rows,)
    float* scores;   // (TILE, KEY_BLOCK)

    // How many keys of the block from `block` row i sees.
    int64_t seen(int64_t i, int64_t block) const {
        const int64_t n = start + i / group + 1 - block;
        return n < 0 ? 0 : n < KEY_BLOCK ? n : KEY_BLOCK;
    }
};

#if defined(SF_AVX512) || defined(SF_AVX2)
SF_INLINE float largest(F16 a) {
#if defined(SF_AVX512)
    __m256 low = _mm512_castps512_ps256(a.v);
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
    __m256 eight = _mm256_max_ps(low, high);
#else
    __m256 eight = _mm256_max_ps(a.lo, a.hi);
#endif
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#else
SF_INLINE float largest(F16 a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; ++l)
            a.v[l] = a.v[l] > a.v[l + half] ? a.v[l] : a.v[l + half];
    return a.v[0];
}
#endif

// Row i's raw scores become scaled ones, minus infinity beyond the n that it sees up to a whole
// vector. Returns the highest.
SF_INLINE float scale_scores(float* scores, int64_t n, float scale) {
    alignas(64) static const float COUNT[LANES] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                   8, 9, 10, 11, 12, 13, 14, 15};
    const F16 lowest = set1(-INFINITY);
    F16 highest = lowest;
    for (int64_t j = 0; j < n; j += LANES) {
        F16 s = mul(load(scores + j), set1(scale));
        if (n - j < LANES) s = select(less(load(COUNT), set1(float(n - j))), s, lowest);
        store(scores + j, s);
        highest = max(highest, s);
    }
    return largest(highest);
}

// Scores of rows [i, i + R) become weights; acc and total are scaled to the new maximum.
template <int R>
inline void weigh(AttentionRows& rows, int64_t i, const int64_t (&seen)[R]) {
    alignas(64) float change[LANES] = {};
    for (int r = 0; r < R; ++r) {
        if (!seen[r]) continue;
        const float before = rows.highest[i + r];
        const float now = scale_scores(rows.scores + r * KEY_BLOCK, seen[r], rows.scale);
        rows.highest[i + r] = before > now ? before : now;
        change[r] = before - rows.highest[i + r];
    }
    store(change, exp_of_negative(load(change)));
    for (int r = 0; r < R; ++r) {
        if (!seen[r]) continue;
        float* scores = rows.scores + r * KEY_BLOCK;
        const F16 highest = set1(rows.highest[i + r]);
        F16 sums = zero();
        for (int64_t j = 0; j < seen[r]; j += LANES) {
            F16 weight = exp_of_negative(sub(load(scores + j), highest));
            store(scores + j, weight);
            sums = add(sums, weight);
        }
        rows.total[i + r] = __builtin_fmaf(rows.total[i + r], change[r], sum(sums));
        float* acc = rows.acc + (i + r) * rows.width;
        if (change[r] != 1.0f)
            for (int64_t d = 0; d < rows.width; d += LANES)
                store(acc + d, mul(load(acc + d), set1(change[r])));
    }
}

// acc (R, width) += weights (R, depth) @ values (depth, width), depth ascending.
template <int R, int V, class T>
SF_INLINE void gather_tile(const float* weights, const T* values, int64_t ldv, int64_t depth,
                           float* acc, int64_t width) {
    F16 sums[R][V];
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int v = 0; v < V; ++v) sums[i][v] = load(acc + i * width + v * LANES);
    combine_tile<R, V>(weights, KEY_BLOCK, 1, values, ldv, LANES, depth, sums);
    SF_UNROLL
    for (int i = 0; i < R; ++i)
        SF_UNROLL
        for (int v = 0; v < V; ++v) store(acc + i * width + v * LANES, sums[i][v]);
}

template <int R, class T>
inline void gather(const float* weights, const T* values, int64_t ldv, int64_t depth, float* acc,
                   int64_t width) {
    // Few rows leave registers for more columns, and need them: a step waits for the last.
    constexpr int V = (R == 1 ? 4 : R <= 3 ? 2 : 1) * (COMBINE_VECTORS);
    int64_t d = 0;
    for (; d + V * LANES <= width; d += V * LANES)
        gather_tile<R, V>(weights, values + d, ldv, depth, acc + d, width);
    for (; d < width; d += LANES)
        gather_tile<R, 1>(weights, values + d, ldv, depth, acc + d, width);
}

// Values of keys [begin, end) of a block, for rows of which row r sees the first seen[r]: those that
// all see in one pass, the rest row by row, so that no row meets a later token's value.
template <int R, class T>
inline void gather_seen(AttentionRows& rows, int64_t i, const int64_t (&seen)[R], const T* values,
                        int64_t ldv, int64_t begin, int64_t end) {
    int64_t all = end;
    for (int r = 0; r < R; ++r) all = std::min(all, seen[r]);
    float* acc = rows.acc + i * rows.width;
    if (all > begin) gather<R>(rows.scores + begin, values, ldv, all - begin, acc, rows.width);
    all = std::max(all, begin);
    for (int r = 0; r < R; ++r) {
        const int64_t rest = std::min(seen[r], end) - all;
        if (rest > 0)
            gather<1>(rows.scores + r * KEY_BLOCK + all, values + (all - begin) * ldv, ldv, rest,
                      acc + r * rows.width, rows.width);
    }
}

// Where a head's keys and values of a sequence lie.
template <class T>
struct HeadPages {
    const T *keys, *values;
    const int64_t* page;
    int64_t keys_stride, values_stride, size, dim;

    HeadPages(const sf_kv_layer& layer, const sf_kv_plan& plan, int64_t sequence, int64_t head)
        : keys(static_cast<const T*>(layer.keys) + head * layer.page_tokens * layer.head_dim),
          values(static_cast<const T*>(layer.values) + head * layer.page_tokens * layer.head_dim),
          page(plan.page + plan.first_page[sequence]), keys_stride(layer.keys_stride),
          values_stride(layer.values_stride), size(layer.page_tokens), dim(layer.head_dim) {}

    const T* key(int64_t position) const {
        return keys + page[position / size] * keys_stride + position % size * dim;
    }
    const T* value(int64_t position) const {
        return values + page[position / size] * values_stride + position % size * dim;
    }
    // Calls piece(position, count) for the runs of [begin, end) that lie in one page each.
    template <class Piece>
    void pieces(int64_t begin, int64_t end, const Piece& piece) const {
        while (begin < end) {
            const int64_t count = std::min(end - begin, size - begin % size);
            piece(begin, count);
            begin += count;
        }
    }
};

// What lies scattered, so that the processor cannot guess it, is asked for ahead of its use: into
// the first cache what comes next, into the second what comes after some work.
template <int CACHE = 1, class T>
inline void ask_for(const T* from, int64_t count) {
    const char* p = reinterpret_cast<const char*>(from);
    for (int64_t b = 0; b < count * int64_t(sizeof(T)); b += 64)
        __builtin_prefetch(p + b, 0, CACHE == 1 ? 3 : 2);
}

// A block of keys [block, end) for few rows: read where they lie.
template <int R, class T>
inline void few_rows_block(AttentionRows& rows, int64_t i, const HeadPages<T>& pages,
                           int64_t block, int64_t last, const float* packed_values) {
    int64_t seen[R], most = 0;
    for (int r = 0; r < R; ++r) most = std::max(most, seen[r] = rows.seen(i + r, block));
    if (!most) return;
    const int64_t end = block + most;
    const bool first_tile = i == 0;
    pages.pieces(block, end, [&](int64_t position, int64_t count) {
        if (first_tile && position + count < last)
            ask_for(pages.key(position + count),
                    std::min(count, last - position - count) * rows.dim);
        dot(rows.q + i * rows.width, rows.width, R, pages.key(position), rows.dim, count, rows.dim,
            rows.scores + (position - block), KEY_BLOCK);
    });
    weigh<R>(rows, i, seen);
    if (packed_values) {
        gather_seen<R>(rows, i, seen, packed_values, rows.width, 0, most);
        return;
    }
    pages.pieces(block, end, [&](int64_t position, int64_t count) {
        if (first_tile && position + count < last)
            ask_for(pages.value(position + count),
                    std::min(count, last - position - count) * rows.dim);
        gather_seen<R>(rows, i, seen, pages.value(position), rows.dim, position - block,
                       position - block + count);
    });
}

// The same for many rows, whose keys were turned into panels and values copied.
template <int R>
inline void packed_block(AttentionRows& rows, int64_t i, int64_t block, const float* panels,
                         const float* values) {
    int64_t seen[R], most = 0;
    for (int r = 0; r < R; ++r) most = std::max(most, seen[r] = rows.seen(i + r, block));
    if (!most) return;
    const int64_t runs = panel_runs(rows.dim);
    constexpr int FEW = R < SCORE_ROWS ? R : SCORE_ROWS;
    for (int64_t j = 0; j < most; j += PANELS * LANES)
        for (int r = 0; r < R; r += FEW) {
            F16 sums[FEW][PANELS];
            panel_tile<2>(rows.q + (i + r) * rows.width, rows.width, panels + j * rows.width, runs,
                          sums);
            SF_UNROLL
            for (int k = 0; k < FEW; ++k)
                SF_UNROLL
                for (int v = 0; v < PANELS; ++v)
                    store(rows.scores + (r + k) * KEY_BLOCK + j + v * LANES, sums[k][v]);
        }
    weigh<R>(rows, i, seen);
    gather_seen<R>(rows, i, seen, values, rows.width, 0, most);
}

// Keys [block, end) as panels, four to a block; missing ones are zero.
template <class T>
inline void pack_keys(const HeadPages<T>& pages, int64_t block, int64_t end, int64_t width,
                      float* panels) {
    for (int64_t first = block; first < block + KEY_BLOCK; first += LANES, panels += LANES * width) {
        const int64_t count = std::min<int64_t>(end - first, LANES);
        if (count <= 0) {
            std::fill(panels, panels + LANES * width, 0.0f);
        } else if (count <= pages.size - first % pages.size) {
            pack_panel(pages.key(first), pages.dim, count, pages.dim, panels);
        } else {
            // Keys of several pages: element by element into their lanes.
            std::fill(panels, panels + LANES * width, 0.0f);
            for (int64_t k = 0; k < count; ++k)
                for (int64_t i = 0, runs = panel_runs(pages.dim), at = k; i < LANES; ++i)
                    for (int64_t m = 0; m < runs; ++m, at += LANES)
                        if (const int64_t d = TREE_ORDER[i] + m * LANES; d < pages.dim)
                            panels[at] = widen(pages.key(first + k)[d]);
        }
    }
}

template <class T>
inline void pack_values(const HeadPages<T>& pages, int64_t block, int64_t end, int64_t width,
                        float* values) {
    pages.pieces(block, end, [&](int64_t position, int64_t count) {
        const T* from = pages.value(position);
        for (int64_t k = 0; k < count; ++k)
            for (int64_t d = 0; d < pages.dim; d += LANES)
                store(values + (position - block + k) * width + d,
                      load_upto(from + k * pages.dim + d, pages.dim - d));
    });
}

// Put a head's new keys and values into their pages.
template <class T>
inline void write_head(const sf_kv_layer& layer, const sf_kv_plan& plan,
                       const sf_attention_rows& batch, int64_t sequence, int64_t head) {
    const HeadPages<T> pages(layer, plan, sequence, head);
    const int64_t dim = layer.head_dim, start = plan.start[sequence];
    const T* k = static_cast<const T*>(batch.k) + head * dim;
    const T* v = static_cast<const T*>(batch.v) + head * dim;
    for (int64_t t = 0; t < plan.length[sequence]; ++t) {
        const int64_t row = plan.offset[sequence] + t;
        std::memcpy(const_cast<T*>(pages.key(start + t)), k + row * batch.k_stride,
                    size_t(dim) * sizeof(T));
        std::memcpy(const_cast<T*>(pages.value(start + t)), v + row * batch.v_stride,
                    size_t(dim) * sizeof(T));
    }
}

template <class T>
void attend(const sf_kv_layer& layer, const sf_kv_plan& plan, const sf_attention_rows& batch,
            const AttentionTask& task) {
    const int64_t group = batch.num_heads / layer.kv_heads, dim = layer.head_dim;
    const int64_t width = round_up(dim), count = task.count * group;
    const bool few = count <= FEW_ROWS, copy_values = !few || width != dim;
    Scratch& scratch = Scratch::of_thread();
    const int64_t block_bytes = KEY_BLOCK * width * 4;
    scratch.reserve(scratch_bytes(count * width * 4, count * width * 4, count * 4, count * 4,
                                  TILE * KEY_BLOCK * 4, few ? 0 : block_bytes,
                                  copy_values ? block_bytes : 0));
    AttentionRows rows{group, plan.start[task.sequence] + task.first, dim, width,
                       float(batch.scale), scratch.take<float>(count * width),
                       scratch.take<float>(count * width), scratch.take<float>(count),
                       scratch.take<float>(count), scratch.take<float>(TILE * KEY_BLOCK)};
    float* panels = few ? nullptr : scratch.take<float>(KEY_BLOCK * width);
    float* values = copy_values ? scratch.take<float>(KEY_BLOCK * width) : nullptr;
    std::fill(rows.acc, rows.acc + count * width, 0.0f);
    std::fill(rows.highest, rows.highest + count, -INFINITY);
    std::fill(rows.total, rows.total + count, 0.0f);
    const int64_t first_row = plan.offset[task.sequence] + task.first;
    const T* q = static_cast<const T*>(batch.q) + task.head * group * dim;
    auto query = [&](int64_t i) {
        return q + (first_row + i / group) * batch.q_stride + i % group * dim;
    };
    for (int64_t i = 0; i < count; ++i) {
        const T* from = query(i);
        if (i + 6 < count) ask_for(query(i + 6), dim);
        float* to = rows.q + i * width;
        if (!few)
            pack_row(from, dim, to);
        else
            for (int64_t d = 0; d < dim; d += LANES)
                store(to + d, load_upto(from + d, dim - d));
    }
    const HeadPages<T> pages(layer, plan, task.sequence, task.head);
    const int64_t last = rows.start + task.count;
    for (int64_t block = 0; block < last; block += KEY_BLOCK) {
        const int64_t end = std::min(block + KEY_BLOCK, last);
        if (!few) {
            pages.pieces(end, std::min(end + KEY_BLOCK, last), [&](int64_t position, int64_t n) {
                ask_for<2>(pages.key(position), n * dim);
                ask_for<2>(pages.value(position), n * dim);
            });
            pack_keys(pages, block, end, width, panels);
        }
        if (copy_values) pack_values(pages, block, end, width, values);
        tiles_of_six(count, [&]<int R>(int64_t i) {
            if (few)
                few_rows_block<R>(rows, i, pages, block, last, values);
            else
                packed_block<R>(rows, i, block, panels, values);
        });
    }
    T* out = static_cast<T*>(batch.out) + task.head * group * dim;
    for (int64_t i = 0; i < count; ++i) {
        T* to = out + (first_row + i / group) * batch.out_stride + i % group * dim;
        const F16 total = set1(rows.total[i]);
        // Plus zero: the sign of a zero may tell of a weight that vanished.
        for (int64_t d = 0; d < dim; d += LANES)
            store_upto(to + d, add(div(load(rows.acc + i * width + d), total), zero()), dim - d);
    }
}

template <class T>
void attention(const sf_kv_layer& layer, const sf_kv_plan& plan, const sf_attention_rows& batch,
               int64_t threads) {
    const int64_t group = batch.num_heads / layer.kv_heads;
    const int64_t tokens = std::max<int64_t>(1, ROW_BLOCK / group);
    std::vector<AttentionTask> tasks;
    std::vector<int64_t> long_ones;
    int64_t pairs = 0, written = 0;
    for (int64_t s = 0; s < plan.num_sequences; ++s) {
        const int64_t length = plan.length[s];
        pairs += length * (plan.start[s] + (length + 1) / 2);
        if (length > tokens) {
            long_ones.push_back(s);
            written += length;
        }
        for (int64_t first = (length - 1) / tokens * tokens; length && first >= 0; first -= tokens)
            for (int64_t head = 0; head < layer.kv_heads; ++head)
                tasks.push_back({s, head, first, std::min(tokens, length - first)});
    }
    const int64_t heads = layer.kv_heads;
    parallel(int64_t(long_ones.size()) * heads, threads, written * heads * layer.head_dim * 4,
             [&](int64_t task) {
                 write_head<T>(layer, plan, batch, long_ones[size_t(task / heads)], task % heads);
             });
    parallel(int64_t(tasks.size()), threads, pairs * batch.num_heads * layer.head_dim * 2,
             [&](int64_t number) {
                 const AttentionTask& task = tasks[size_t(number)];
                 // A task that has the whole sequence is the only one that reads what is new.
                 if (plan.length[task.sequence] <= tokens)
                     write_head<T>(layer, plan, batch, task.sequence, task.head);
                 attend<T>(layer, plan, batch, task);
             });
}

}  // namespace sf
