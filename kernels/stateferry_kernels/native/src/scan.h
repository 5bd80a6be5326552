// The chunk scan: a packed batch of tokens, chunk by chunk along each sequence.
#pragma once

#include <cstring>

#include "abi.h"
#include "interval.h"
#include "support.h"

namespace sf {

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
        for (int64_t h = 0; h < num_heads_; ++h)
            state_[h] = pool(plan_.state_slot[sequence_]) + (head_ + h) * P_ * N_;
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
    }

private:
    ST* pool(int64_t slot) const {
        return static_cast<ST*>(layer_.ssm_state) + slot * layer_.ssm_stride;
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
            num_heads_ * 8, num_heads_ * P_ * N_ * int64_t(sizeof(ST)), Q_ * ldn_ * 4,
            Q_ * ldn_ * 4, Q_ * ldq_ * 4, num_heads_ * ldq_ * 4, num_heads_ * ldq_ * 4,
            Q_ * ldx_ * 4, Q_ * ldx_ * 4, P_ * N_ * 4, ldq_ * 4, COMBINE_ROWS * ldq_ * 4,
            Q_ * ldx_ * 4, round_up(num_heads_) * 4));
        state_ = scratch.take<const ST*>(num_heads_);
        running_ = scratch.take<ST>(num_heads_ * P_ * N_);
        B_ = scratch.take<float>(Q_ * ldn_);
        C_ = scratch.take<float>(Q_ * ldn_);
        CB_ = scratch.take<float>(Q_ * ldq_);
        dt_ = scratch.take<float>(num_heads_ * ldq_);
        cumsum_ = scratch.take<float>(num_heads_ * ldq_);
        x_ = scratch.take<float>(Q_ * ldx_);
        weighted_ = scratch.take<float>(Q_ * ldx_);
        wide_state_ = scratch.take<float>(P_ * N_);
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
        for (int64_t s = 0; s < length_; ++s) {
            bool old = s < first_;
            widen_row(old ? old_B + s * layer_.ngroups * N_ : B + s * rows_.B_stride, N_,
                      B_ + s * ldn_);
            if (!old) widen_row(C + s * rows_.C_stride, N_, C_ + s * ldn_);
        }
        // Blocks of columns no further than their rows: what lies beyond is never used.
        for (int64_t t = first_; t < length_; t += DOT_ROWS) {
            int64_t count = length_ - t < DOT_ROWS ? length_ - t : DOT_ROWS;
            dot(C_ + t * ldn_, ldn_, count, B_, ldn_, t + count, N_, CB_ + t * ldq_, ldq_);
        }
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

    // A head's rows lie kilobytes apart, where the processor does not look ahead by itself.
    template <bool WRITE, class Row>
    void fetch(const Row* first, int64_t stride) const {
        for (int64_t s = first_; s < length_; ++s)
            for (int64_t p = 0; p < P_; p += 64 / int64_t(sizeof(Row)))
                __builtin_prefetch(first + s * stride + p, WRITE);
    }

    void run_head(int64_t h, int64_t slot) {
        fetch<true>(static_cast<const T*>(rows_.out) + token_ * rows_.out_stride + (head_ + h) * P_,
                    rows_.out_stride);
        if (h + 1 < num_heads_) fetch<false>(x_row(0, h + 1), rows_.x_stride);
        for (int64_t s = 0; s < length_; ++s)
            widen_row(s < first_ ? tail_x(s) + h * P_ : x_row(s, h), P_, x_ + s * ldx_);
        const float* c = cumsum_ + h * ldq_;
        for (int64_t s = 0; s < length_; s += LANES) store(grown_ + s, exp(load(c + s)));
        dot_blocked(C_ + first_ * ldn_, ldn_, length_ - first_, wide(state_[h]), N_, P_, N_,
                    before_ + first_ * ldx_, ldx_);
        int64_t t = first_;
        for (; t + COMBINE_ROWS <= length_; t += COMBINE_ROWS) output<COMBINE_ROWS>(h, t);
        for (; t + 4 <= length_; t += 4) output<4>(h, t);
        for (; t + 2 <= length_; t += 2) output<2>(h, t);
        if (t < length_) output<1>(h, t);
        if (length_ < Q_) return;
        fold_weights(c, dt_ + h * ldq_, Q_, weights_);
        for (int64_t s = 0; s < Q_; ++s)
            widen_row(x_ + s * ldx_, P_, weights_[s], weighted_ + s * ldx_);
        ST* next = slot >= 0 ? pool(slot) + (head_ + h) * P_ * N_ : running_ + h * P_ * N_;
        fold(state_[h], P_, N_, grown_[Q_ - 1], weighted_, ldx_, B_, ldn_, Q_, next);
        state_[h] = next;
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
        combine_tile<R, V>(weights_, ldq_, 1, x_ + p, ldx_, t + 1, sums);
        // Of the block's own tokens each row takes those up to itself.
        SF_UNROLL
        for (int j = 1; j < R; ++j)
            SF_UNROLL
            for (int v = 0; v < V; ++v) {
                F16 x = load(x_ + (t + j) * ldx_ + p + v * LANES);
                SF_UNROLL
                for (int i = j; i < R; ++i)
                    sums[i][v] = fma(set1(weights_[i * ldq_ + t + j]), x, sums[i][v]);
            }
        const float* D = params_.D ? params_.D + head_ + h : nullptr;
        SF_UNROLL
        for (int i = 0; i < R; ++i)
            SF_UNROLL
            for (int v = 0; v < V; ++v) {
                int64_t column = p + v * LANES, at = (head_ + h) * P_ + column;
                int64_t token = token_ + t + i;
                const T* z = rows_.z ? static_cast<const T*>(rows_.z) + token * rows_.z_stride + at
                                     : nullptr;
                finish(sums[i][v], load(before_ + (t + i) * ldx_ + column), grown_[t + i], D,
                       load(x_ + (t + i) * ldx_ + column), z, P_ - column,
                       static_cast<T*>(rows_.out) + token * rows_.out_stride + at);
            }
    }

    const float* wide(const float* state) { return state; }
    const float* wide(const bf16* state) {
        // Each row on its own: rows of N elements are not padded.
        for (int64_t i = 0; i < P_ * N_; i += LANES)
            store_upto(wide_state_ + i, load_upto(state + i, P_ * N_ - i), P_ * N_ - i);
        return wide_state_;
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
    const ST** state_ = nullptr;  // per head, where its state is now
    ST* running_ = nullptr;       // the states that nobody asked to keep
    float *B_, *C_, *CB_, *dt_, *cumsum_, *x_, *weighted_, *wide_state_, *grown_, *weights_;
    float *before_, *processed_;
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
