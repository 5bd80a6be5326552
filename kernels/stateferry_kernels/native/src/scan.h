// The chunk scan: a packed batch of tokens, chunk by chunk along each sequence.
#pragma once

#include <cstring>

#include "abi.h"
#include "interval.h"
#include "support.h"
#include "turned.h"

namespace sf {

// Fewer rows that end no chunk read their state where it lies.
constexpr int64_t TURN_MIN_ROWS = 16;

// One sequence's rows and some heads of one group: a task, on one thread from end to end.
template <class T, class ST>
class ScanTask {
public:
    ScanTask(const sf_layer& layer, const sf_params& params, const sf_extend_plan& plan,
             const sf_rows& rows, int64_t sequence, int64_t group, int64_t head, int64_t num_heads)
        : layer_(layer), params_(params), plan_(plan), rows_(rows), sequence_(sequence),
          group_(group), head_(head), num_heads_(num_heads), P_(layer.headdim), N_(layer.dstate),
          Q_(layer.grid), ldx_(round_up(P_)), ldn_(round_up(N_)), ldq_(round_up(Q_)) {}

    void run() {
        allocate();
        const int64_t start = plan_.start[sequence_], end = start + plan_.length[sequence_];
        page_ = plan_.tail_page[sequence_];
        in_place_ = end - start < TURN_MIN_ROWS && start / Q_ == end / Q_;
        for (int64_t h = 0; h < num_heads_ && !in_place_; ++h)
            turn_rows(first_state(h), N_, P_, N_, state(h));
        int64_t boundary = plan_.first_boundary[sequence_];
        for (int64_t begin = start / Q_ * Q_; begin < end; begin += Q_) {
            first_ = begin < start ? start - begin : 0;
            length_ = end - begin < Q_ ? end - begin : Q_;
            token_ = plan_.offset[sequence_] + begin - start;
            load_chunk();
            int64_t slot = -1;
            if (boundary < plan_.first_boundary[sequence_ + 1] &&
                plan_.boundary_position[boundary] == begin + Q_)
                slot = plan_.boundary_slot[boundary++];
            for (int64_t h = 0; h < num_heads_; ++h) run_head(h, slot);
            if (length_ < Q_) leave_tail();
        }
        fence_stores();
    }

private:
    ST* pool(int64_t slot) const {
        return static_cast<ST*>(layer_.ssm_state) + slot * layer_.ssm_stride;
    }
    // What head h starts from.
    const ST* first_state(int64_t h) const {
        return pool(plan_.state_slot[sequence_]) + (head_ + h) * P_ * N_;
    }
    T* tail_x(int64_t row) const {
        return static_cast<T*>(layer_.tail_x) + page_ * layer_.tail_x_stride +
               (row * layer_.nheads + head_) * P_;
    }
    float* tail_dt(int64_t row) const {
        return layer_.tail_dt + page_ * layer_.tail_dt_stride + row * layer_.nheads + head_;
    }
    const T* x_row(int64_t row, int64_t h) const {
        return static_cast<const T*>(rows_.x) + (token_ + row) * rows_.x_stride + (head_ + h) * P_;
    }

    void allocate() {
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(
            num_heads_ * ldx_ * ldn_ * 4, Q_ * ldn_ * 4, Q_ * ldn_ * 4, Q_ * ldn_ * 4,
            ldq_ * ldn_ * 4, Q_ * ldq_ * 4, num_heads_ * ldq_ * 4, num_heads_ * ldq_ * 4,
            Q_ * ldx_ * 4, Q_ * ldx_ * 4, ldq_ * 4, COMBINE_ROWS * ldq_ * 4, Q_ * ldx_ * 4,
            round_up(num_heads_) * 4));
        states_ = scratch.take<float>(num_heads_ * ldx_ * ldn_);
        rows_of_group_ = scratch.take<float>(Q_ * ldn_);
        B_strips_ = scratch.take<float>(Q_ * ldn_);
        C_strips_ = scratch.take<float>(Q_ * ldn_);
        B_panels_ = scratch.take<float>(ldq_ * ldn_);
        CB_ = scratch.take<float>(Q_ * ldq_);
        dt_ = scratch.take<float>(num_heads_ * ldq_);
        cumsum_ = scratch.take<float>(num_heads_ * ldq_);
        x_ = scratch.take<float>(Q_ * ldx_);
        weighted_ = scratch.take<float>(Q_ * ldx_);
        grown_ = scratch.take<float>(ldq_);
        weights_ = scratch.take<float>(COMBINE_ROWS * ldq_);
        before_ = scratch.take<float>(Q_ * ldx_);
        processed_ = scratch.take<float>(round_up(num_heads_));
    }

    // What the heads of a group share, and every head's dt and running sum.
    void load_chunk() {
        const T* B = static_cast<const T*>(rows_.B) + token_ * rows_.B_stride + group_ * N_;
        const T* C = static_cast<const T*>(rows_.C) + token_ * rows_.C_stride + group_ * N_;
        const T* old_B = static_cast<const T*>(layer_.tail_B) + page_ * layer_.tail_B_stride +
                         group_ * N_;
        float* rows = rows_of_group_;
        for (int64_t s = 0; s < length_; ++s)
            widen_row(s < first_ ? old_B + s * layer_.ngroups * N_ : B + s * rows_.B_stride, N_,
                      rows + s * ldn_);
        turn_rows(rows, ldn_, length_, ldn_, B_panels_);
        if (length_ == Q_) strips_of_columns(rows, ldn_, Q_, N_, B_strips_);
        for (int64_t t = first_; t < length_; ++t)
            widen_row(C + t * rows_.C_stride, N_, rows + t * ldn_);
        strips_of_rows(rows + first_ * ldn_, ldn_, length_ - first_, ldn_, C_strips_);
        // Blocks of columns no further than their rows: what lies beyond is never used.
        strips<DOT_STRIP>(length_ - first_, [&]<int R>(int64_t t) {
            panels_at_once(ceil_div(first_ + t + R, LANES), [&]<int V>(int64_t j) {
                turned_dot<R, V>(C_strips_ + t * ldn_, B_panels_ + j * LANES * ldn_, LANES * ldn_,
                                 ldn_, CB_ + (first_ + t) * ldq_ + j * LANES, ldq_);
            });
        });
        const char* raw = static_cast<const char*>(rows_.dt);
        const int64_t size = rows_.dt_dtype == SF_BFLOAT16 ? 2 : 4;
        for (int64_t s = 0; s < length_; ++s) {
            const float* dt = tail_dt(s);
            if (s >= first_) {
                process_dt(raw + (token_ + s) * rows_.dt_stride * size, rows_.dt_dtype, head_,
                           head_ + num_heads_, params_, processed_);
                dt = processed_;
            }
            for (int64_t h = 0; h < num_heads_; ++h) {
                float before = s ? cumsum_[h * ldq_ + s - 1] : 0.0f;
                dt_[h * ldq_ + s] = dt[h];
                cumsum_[h * ldq_ + s] = next_cumsum(before, dt[h], params_.A[head_ + h]);
            }
        }
    }

    // Head h's state, turned.
    float* state(int64_t h) const { return states_ + h * ldx_ * ldn_; }
    // Sixteen columns of row s of what lies in panels of (Q, 16).
    float* at(float* panels, int64_t s, int64_t p) const { return panels + p * Q_ + s * LANES; }

    void run_head(int64_t h, int64_t slot) {
        for (int64_t s = 0; s < length_; ++s) {
            const T* x = s < first_ ? tail_x(s) + h * P_ : x_row(s, h);
            for (int64_t p = 0; p < P_; p += LANES)
                store(at(x_, s, p), load_upto(x + p, P_ - p));
        }
        const float* c = cumsum_ + h * ldq_;
        for (int64_t s = 0; s < length_; s += LANES) store(grown_ + s, exp(load(c + s)));
        times_state(h);
        int64_t t = first_;
        for (; t + COMBINE_ROWS <= length_; t += COMBINE_ROWS) output<COMBINE_ROWS>(h, t);
        for (; t + 4 <= length_; t += 4) output<4>(h, t);
        for (; t + 2 <= length_; t += 2) output<2>(h, t);
        if (t < length_) output<1>(h, t);
        if (length_ < Q_) return;
        fold_weights(c, dt_ + h * ldq_, Q_, weights_);
        for (int64_t p = 0; p < P_; p += LANES)
            for (int64_t s = 0; s < Q_; ++s)
                store(at(weighted_, s, p), mul(set1(weights_[s]), load(at(x_, s, p))));
        strips<FOLD_STRIP>(N_, [&]<int R>(int64_t n) {
            panels_at_once(ldx_ / LANES, [&]<int V>(int64_t j) {
                turned_fold<ST, R, V>(state(h) + j * LANES * ldn_ + n * LANES, LANES * ldn_,
                                      grown_[Q_ - 1], weighted_ + j * LANES * Q_, LANES * Q_,
                                      B_strips_ + n * Q_, Q_);
            });
        });
        if (slot >= 0) turn_back(state(h), P_, N_, pool(slot) + (head_ + h) * P_ * N_);
    }

    // before_ = C . S of the new rows.
    void times_state(int64_t h) {
        if (in_place_) {
            dot(rows_of_group_ + first_ * ldn_, ldn_, length_ - first_, wide(first_state(h), h), N_,
                P_, N_, before_ + first_ * ldx_, ldx_);
            return;
        }
        panels_at_once(ldx_ / LANES, [&]<int V>(int64_t j) {
            strips<DOT_STRIP>(length_ - first_, [&]<int R>(int64_t t) {
                fetch<R, V>(h, t, j * LANES);
                turned_dot<R, V>(C_strips_ + t * ldn_, state(h) + j * LANES * ldn_, LANES * ldn_,
                                 ldn_, before_ + (first_ + t) * ldx_ + j * LANES, ldx_);
            });
        });
    }
    const float* wide(const float* state, int64_t) const { return state; }
    const float* wide(const bf16* from, int64_t h) const {
        widen_row(from, P_ * N_, state(h));
        return state(h);
    }

    // Asks for what strip t's rows are written to, and for the next head's inputs: a little at a time.
    // A head's rows lie kilobytes apart, where the processor does not look ahead by itself.
    template <int R, int V>
    SF_INLINE void fetch(int64_t h, int64_t t, int64_t p) const {
        SF_UNROLL
        for (int i = 0; i < R; ++i) {
            const int64_t token = token_ + first_ + t + i, at = (head_ + h) * P_ + p;
            const T* out = static_cast<const T*>(rows_.out) + token * rows_.out_stride + at;
            const T* x = static_cast<const T*>(rows_.x) + token * rows_.x_stride + at + P_;
            SF_UNROLL
            for (int v = 0; v < V; ++v) {
                __builtin_prefetch(out + v * LANES, 1);
                if (h + 1 < num_heads_) __builtin_prefetch(x + v * LANES);
            }
        }
    }

    // Rows [t, t + R) of one head.
    template <int R>
    void output(int64_t h, int64_t t) {
        SF_UNROLL
        for (int i = 0; i < R; ++i)
            row_weights(CB_ + (t + i) * ldq_, cumsum_ + h * ldq_, dt_ + h * ldq_,
                        cumsum_[h * ldq_ + t + i], t + i + 1, weights_ + i * ldq_);
        constexpr int V = COMBINE_VECTORS;
        int64_t p = 0;
        for (; p + (V - 1) * LANES < P_; p += V * LANES) output_columns<R, V>(h, t, p);
        for (; p < P_; p += LANES) output_columns<R, 1>(h, t, p);
    }

    template <int R, int V>
    void output_columns(int64_t h, int64_t t, int64_t p) {
        F16 sums[R][V];
        SF_UNROLL
        for (int i = 0; i < R; ++i)
            SF_UNROLL
            for (int v = 0; v < V; ++v) sums[i][v] = zero();
        combine_tile<R, V>(weights_, ldq_, 1, at(x_, 0, p), LANES, Q_ * LANES, t + 1, sums);
        // Of the block's own tokens each row takes those up to itself.
        SF_UNROLL
        for (int j = 1; j < R; ++j)
            SF_UNROLL
            for (int v = 0; v < V; ++v) {
                F16 x = load(at(x_, t + j, p + v * LANES));
                SF_UNROLL
                for (int i = j; i < R; ++i)
                    sums[i][v] = fma(set1(weights_[i * ldq_ + t + j]), x, sums[i][v]);
            }
        const float* D = params_.D ? params_.D + head_ + h : nullptr;
        SF_UNROLL
        for (int i = 0; i < R; ++i)
            SF_UNROLL
            for (int v = 0; v < V; ++v) {
                int64_t column = p + v * LANES, home = (head_ + h) * P_ + column;
                int64_t token = token_ + t + i;
                const T* z = rows_.z ? static_cast<const T*>(rows_.z) + token * rows_.z_stride + home
                                     : nullptr;
                finish(sums[i][v], load(before_ + (t + i) * ldx_ + column), grown_[t + i], D,
                       load(at(x_, t + i, column)), z, P_ - column,
                       static_cast<T*>(rows_.out) + token * rows_.out_stride + home);
            }
    }

    // Inputs since the last grid point. B belongs to all heads of the group, and other tasks may
    // still be reading its old rows: leave_tail_B follows when all are done.
    void leave_tail() {
        for (int64_t s = first_; s < length_; ++s) {
            std::memcpy(tail_x(s), x_row(s, 0), size_t(num_heads_ * P_) * sizeof(T));
            for (int64_t h = 0; h < num_heads_; ++h) tail_dt(s)[h] = dt_[h * ldq_ + s];
        }
    }

    const sf_layer& layer_;
    const sf_params& params_;
    const sf_extend_plan& plan_;
    const sf_rows& rows_;
    const int64_t sequence_, group_, head_, num_heads_, P_, N_, Q_, ldx_, ldn_, ldq_;
    // Of the current chunk: rows [first_, length_) are new, row 0 is batch row token_.
    int64_t first_ = 0, length_ = 0, token_ = 0, page_ = 0;
    bool in_place_ = false;  // no state is turned
    float *states_, *rows_of_group_, *B_strips_, *C_strips_, *B_panels_, *CB_, *dt_, *cumsum_, *x_;
    float *weighted_, *grown_, *weights_, *before_, *processed_;
};

template <class T>
void leave_tail_B(const sf_layer& layer, const sf_extend_plan& plan, const sf_rows& rows,
                  int64_t sequence) {
    const int64_t start = plan.start[sequence], end = start + plan.length[sequence];
    const int64_t begin = end / layer.grid * layer.grid, width = layer.ngroups * layer.dstate;
    T* tail = static_cast<T*>(layer.tail_B) + plan.tail_page[sequence] * layer.tail_B_stride;
    for (int64_t position = begin < start ? start : begin; position < end; ++position) {
        const T* B = static_cast<const T*>(rows.B) +
                     (plan.offset[sequence] + position - start) * rows.B_stride;
        std::memcpy(tail + (position - begin) * width, B, size_t(width) * sizeof(T));
    }
}

template <class T, class ST>
void chunk_scan(const sf_layer& layer, const sf_params& params, const sf_extend_plan& plan,
                const sf_rows& rows, int64_t threads) {
    const int64_t per_group = layer.nheads / layer.ngroups;
    const int64_t parts = split(per_group, plan.num_sequences * layer.ngroups, threads, 1);
    int64_t tokens = 0;
    for (int64_t i = 0; i < plan.num_sequences; ++i) tokens += plan.length[i];
    const int64_t operations = tokens * layer.nheads * layer.headdim * layer.dstate * 4;
    parallel(plan.num_sequences * layer.ngroups * parts, threads, operations, [&](int64_t task) {
        int64_t part = task % parts, group = task / parts % layer.ngroups;
        int64_t first = part * per_group / parts, last = (part + 1) * per_group / parts;
        ScanTask<T, ST>(layer, params, plan, rows, task / parts / layer.ngroups, group,
                        group * per_group + first, last - first)
            .run();
    });
    for (int64_t i = 0; i < plan.num_sequences; ++i) leave_tail_B<T>(layer, plan, rows, i);
}

}  // namespace sf
