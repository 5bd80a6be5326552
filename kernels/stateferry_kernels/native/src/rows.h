// Single rows on a state and a list of inputs: decode rows and draft rows.
//
// A sequence's entries are its tail's rows, then its new tokens. A row is evaluated on a list of
// entries that ends with its own token: for a decode row the whole tail, for a draft row the tail
// and the token's ancestors. A list that passes the grid is cut there: what comes before is folded
// into a state that the rest starts from, in scratch memory.
#pragma once

#include <cstring>
#include <vector>

#include "abi.h"
#include "interval.h"
#include "support.h"

namespace sf {

struct RowList {
    int64_t fold = -1;  // the folded state it starts from, or the sequence's own
    std::vector<int32_t> entries;
};

// One sequence's new tokens and what each follows.
struct RowsPlan {
    int64_t state_slot, tail_page, tail_rows;
    int64_t first_row, num_rows;  // in the batch
    int64_t write_page, write_row;
    std::vector<RowList> rows;
    std::vector<RowList> folds;  // full intervals of entries

    // A decode step's only token, kept in the tail itself.
    static RowsPlan decode(const sf_decode_plan& plan, int64_t row) {
        RowsPlan made{plan.state_slot[row], plan.tail_page[row], plan.tail_row[row], row, 1,
                      plan.tail_page[row], plan.tail_row[row], {}, {}};
        made.rows.resize(1);
        for (int64_t s = 0; s <= made.tail_rows; ++s) made.rows[0].entries.push_back(int32_t(s));
        return made;
    }

    static RowsPlan verify(const sf_verify_plan& plan, int64_t sequence, int64_t grid) {
        const int64_t first = plan.first_node[sequence];
        const int64_t count = plan.first_node[sequence + 1] - first;
        RowsPlan made{plan.state_slot[sequence], plan.tail_page[sequence],
                      plan.tail_rows[sequence], first, count,
                      plan.draft_page[sequence], 0, {}, {}};
        made.rows.resize(size_t(count));
        for (int64_t node = 0; node < count; ++node) {
            RowList& row = made.rows[size_t(node)];
            const int64_t parent = plan.parent[first + node];
            if (parent >= 0) {
                row = made.rows[size_t(parent)];
                if (int64_t(row.entries.size()) == grid) {
                    row.fold = made.fold_after(row);
                    row.entries.clear();
                }
            } else {
                for (int64_t s = 0; s < made.tail_rows; ++s) row.entries.push_back(int32_t(s));
            }
            row.entries.push_back(int32_t(made.tail_rows + node));
        }
        return made;
    }

private:
    int64_t fold_after(const RowList& full) {
        for (size_t f = 0; f < folds.size(); ++f)
            if (folds[f].entries.back() == full.entries.back()) return int64_t(f);
        folds.push_back(full);
        return int64_t(folds.size()) - 1;
    }
};

// One sequence's new tokens for some heads of one group.
template <class T, class ST>
class RowsTask {
public:
    RowsTask(const sf_layer& layer, const sf_params& params, const sf_rows& rows,
             const RowsPlan& plan, T* write_x, T* write_B, float* write_dt, int64_t group,
             int64_t head, int64_t num_heads)
        : layer_(layer), params_(params), rows_(rows), plan_(plan), write_x_(write_x),
          write_B_(write_B), write_dt_(write_dt), group_(group), head_(head),
          num_heads_(num_heads), P_(layer.headdim), N_(layer.dstate), Q_(layer.grid),
          R_(plan.num_rows), E_(plan.tail_rows + plan.num_rows), ldx_(round_up(P_)),
          ldn_(round_up(N_)), lde_(round_up(E_)), ldq_(round_up(Q_)) {}

    void run() {
        allocate();
        products_with_B();
        dt_of_entries();
        keep_inputs();
        for (int64_t h = 0; h < num_heads_; ++h) run_head(h);
    }

private:
    const T* tail_x() const {
        return static_cast<const T*>(layer_.tail_x) + plan_.tail_page * layer_.tail_x_stride;
    }
    const T* tail_B() const {
        return static_cast<const T*>(layer_.tail_B) + plan_.tail_page * layer_.tail_B_stride +
               group_ * N_;
    }
    const float* tail_dt() const {
        return layer_.tail_dt + plan_.tail_page * layer_.tail_dt_stride;
    }
    const T* new_x(int64_t row) const {
        return static_cast<const T*>(rows_.x) + (plan_.first_row + row) * rows_.x_stride;
    }
    const T* new_B(int64_t row) const {
        return static_cast<const T*>(rows_.B) + (plan_.first_row + row) * rows_.B_stride +
               group_ * N_;
    }
    // An entry's input of one head, and of the group.
    const T* entry_x(int64_t e, int64_t h) const {
        const T* row = e < plan_.tail_rows ? tail_x() + e * layer_.nheads * P_
                                           : new_x(e - plan_.tail_rows);
        return row + (head_ + h) * P_;
    }
    const T* entry_B(int64_t e) const {
        return e < plan_.tail_rows ? tail_B() + e * layer_.ngroups * N_
                                   : new_B(e - plan_.tail_rows);
    }

    void allocate() {
        const int64_t folds = int64_t(plan_.folds.size());
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(R_ * lde_ * 4, num_heads_ * lde_ * 4, lde_ * 4, ldq_ * 4,
                                      ldq_ * 4, ldq_ * 4, ldq_ * 4, R_ * ldx_ * 4, R_ * LANES * 4,
                                      round_up(num_heads_) * 4, folds * P_ * N_ * int64_t(sizeof(ST)),
                                      folds ? Q_ * ldx_ * 4 : 0, folds ? Q_ * ldn_ * 4 : 0));
        CB_ = scratch.take<float>(R_ * lde_);
        dt_ = scratch.take<float>(num_heads_ * lde_);
        cumsum_ = scratch.take<float>(lde_);
        row_CB_ = scratch.take<float>(ldq_);
        row_c_ = scratch.take<float>(ldq_);
        row_dt_ = scratch.take<float>(ldq_);
        weights_ = scratch.take<float>(ldq_);
        before_ = scratch.take<float>(R_ * ldx_);
        grown_ = scratch.take<float>(R_ * LANES);
        processed_ = scratch.take<float>(round_up(num_heads_));
        folded_ = scratch.take<ST>(folds * P_ * N_);
        weighted_ = scratch.take<float>(folds ? Q_ * ldx_ : 0);
        fold_B_ = scratch.take<float>(folds ? Q_ * ldn_ : 0);
    }

    // C_r . B_e for every new row and entry.
    void products_with_B() {
        const T* C = static_cast<const T*>(rows_.C) + plan_.first_row * rows_.C_stride +
                     group_ * N_;
        dot(C, rows_.C_stride, R_, tail_B(), layer_.ngroups * N_, plan_.tail_rows, N_, CB_, lde_);
        dot(C, rows_.C_stride, R_, new_B(0), rows_.B_stride, R_, N_, CB_ + plan_.tail_rows, lde_);
    }

    void dt_of_entries() {
        for (int64_t e = 0; e < plan_.tail_rows; ++e)
            for (int64_t h = 0; h < num_heads_; ++h)
                dt_[h * lde_ + e] = tail_dt()[e * layer_.nheads + head_ + h];
        const char* raw = static_cast<const char*>(rows_.dt);
        const int64_t size = rows_.dt_dtype == SF_BFLOAT16 ? 2 : 4;
        for (int64_t r = 0; r < R_; ++r) {
            process_dt(raw + (plan_.first_row + r) * rows_.dt_stride * size, rows_.dt_dtype, head_,
                       head_ + num_heads_, params_, processed_);
            for (int64_t h = 0; h < num_heads_; ++h)
                dt_[h * lde_ + plan_.tail_rows + r] = processed_[h];
        }
    }

    // The new tokens' inputs, at their place in the tail or in the draft page.
    void keep_inputs() {
        for (int64_t r = 0; r < R_; ++r) {
            const int64_t row = plan_.write_row + r;
            std::memcpy(write_x_ + (row * layer_.nheads + head_) * P_, new_x(r) + head_ * P_,
                        size_t(num_heads_ * P_) * sizeof(T));
            for (int64_t h = 0; h < num_heads_; ++h)
                write_dt_[row * layer_.nheads + head_ + h] = dt_[h * lde_ + plan_.tail_rows + r];
            if (head_ == group_ * (layer_.nheads / layer_.ngroups))
                std::memcpy(write_B_ + (row * layer_.ngroups + group_) * N_, new_B(r),
                            size_t(N_) * sizeof(T));
        }
    }

    void run_head(int64_t h) {
        const ST* state = static_cast<const ST*>(layer_.ssm_state) +
                          plan_.state_slot * layer_.ssm_stride + (head_ + h) * P_ * N_;
        const T* C = static_cast<const T*>(rows_.C) + plan_.first_row * rows_.C_stride +
                     group_ * N_;
        sums_of_dt(h);
        for (size_t f = 0; f < plan_.folds.size(); ++f) fold_list(h, int64_t(f), state);
        // The rows that start from the sequence's state read it together.
        int64_t r = 0;
        while (r < R_) {
            int64_t last = r + 1;
            const int64_t from = plan_.rows[size_t(r)].fold;
            while (last < R_ && plan_.rows[size_t(last)].fold == from) ++last;
            const ST* start = from < 0 ? state : folded_ + from * P_ * N_;
            dot_streamed(C + r * rows_.C_stride, rows_.C_stride, last - r, start, N_, P_, N_,
                         before_ + r * ldx_, ldx_);
            r = last;
        }
        for (r = 0; r < R_; ++r) output(h, r);
    }

    // c of every entry; after a fold it starts again.
    void sums_of_dt(int64_t h) {
        const float* dt = dt_ + h * lde_;
        const float A = params_.A[head_ + h];
        float c = 0.0f;
        for (int64_t e = 0; e < plan_.tail_rows; ++e)
            cumsum_[e] = c = next_cumsum(c, dt[e], A);
        for (int64_t r = 0; r < R_; ++r) {
            const std::vector<int32_t>& entries = plan_.rows[size_t(r)].entries;
            const int64_t e = plan_.tail_rows + r;
            float before = entries.size() > 1 ? cumsum_[entries[entries.size() - 2]] : 0.0f;
            cumsum_[e] = next_cumsum(before, dt[e], A);
        }
        for (int64_t r = 0; r < R_; ++r)
            store(grown_ + r * LANES, exp(set1(cumsum_[plan_.tail_rows + r])));
    }

    void gather(const RowList& list, const float* CB, int64_t h) {
        const float* dt = dt_ + h * lde_;
        for (size_t s = 0; s < list.entries.size(); ++s) {
            const int32_t e = list.entries[s];
            if (CB) row_CB_[s] = CB[e];
            row_c_[s] = cumsum_[e];
            row_dt_[s] = dt[e];
        }
    }

    void fold_list(int64_t h, int64_t f, const ST* state) {
        const RowList& list = plan_.folds[size_t(f)];
        gather(list, nullptr, h);
        fold_weights(row_c_, row_dt_, Q_, weights_);
        for (int64_t s = 0; s < Q_; ++s) {
            widen_row(entry_x(list.entries[size_t(s)], h), P_, weights_[s], weighted_ + s * ldx_);
            widen_row(entry_B(list.entries[size_t(s)]), N_, fold_B_ + s * ldn_);
        }
        fold(state, P_, N_, exp(row_c_[Q_ - 1]), weighted_, ldx_, fold_B_, ldn_, Q_,
             folded_ + f * P_ * N_);
    }

    void output(int64_t h, int64_t r) {
        const RowList& list = plan_.rows[size_t(r)];
        const int64_t count = int64_t(list.entries.size());
        gather(list, CB_ + r * lde_, h);
        row_weights(row_CB_, row_c_, row_dt_, row_c_[count - 1], count, weights_);
        int64_t p = 0;
        for (; p + 4 * LANES <= P_; p += 4 * LANES) output_columns<4>(h, r, p, 4 * LANES);
        for (; p < P_; p += LANES) output_columns<1>(h, r, p, P_ - p);
    }

    template <int V>
    void output_columns(int64_t h, int64_t r, int64_t p, int64_t n) {
        const std::vector<int32_t>& entries = plan_.rows[size_t(r)].entries;
        F16 sums[V];
        SF_UNROLL
        for (int v = 0; v < V; ++v) sums[v] = zero();
        for (size_t s = 0; s < entries.size(); ++s) {
            const T* x = entry_x(entries[s], h) + p;
            F16 weight = set1(weights_[s]);
            SF_UNROLL
            for (int v = 0; v < V; ++v) {
                // The next head's part of the row: far from the next row's of this head.
                __builtin_prefetch(x + P_ + v * LANES);
                sums[v] = fma(weight, load_upto(x + v * LANES, n - v * LANES), sums[v]);
            }
        }
        const float* D = params_.D ? params_.D + head_ + h : nullptr;
        const int64_t batch_row = plan_.first_row + r, at = (head_ + h) * P_ + p;
        SF_UNROLL
        for (int v = 0; v < V; ++v) {
            const int64_t column = at + v * LANES, rest = n - v * LANES;
            const T* z = rows_.z ? static_cast<const T*>(rows_.z) + batch_row * rows_.z_stride +
                                       column
                                 : nullptr;
            finish(sums[v], load(before_ + r * ldx_ + p + v * LANES), grown_[r * LANES], D,
                   load_upto(new_x(r) + column, rest), z, rest,
                   static_cast<T*>(rows_.out) + batch_row * rows_.out_stride + column);
        }
    }

    const sf_layer& layer_;
    const sf_params& params_;
    const sf_rows& rows_;
    const RowsPlan& plan_;
    T *write_x_, *write_B_;
    float* write_dt_;
    const int64_t group_, head_, num_heads_, P_, N_, Q_, R_, E_, ldx_, ldn_, lde_, ldq_;
    float *CB_, *dt_, *cumsum_, *row_CB_, *row_c_, *row_dt_, *weights_, *before_, *grown_;
    float *processed_, *weighted_, *fold_B_;
    ST* folded_;
};

// drafts is null for decode rows, whose tokens go to the tail itself.
template <class T, class ST>
void run_rows(const sf_layer& layer, const sf_params& params, const sf_rows& rows,
              const std::vector<RowsPlan>& plans, const sf_drafts* drafts, int64_t threads) {
    const int64_t per_group = layer.nheads / layer.ngroups;
    const int64_t count = int64_t(plans.size());
    const int64_t parts = split(per_group, count * layer.ngroups, threads, 2);
    const int64_t operations = count * layer.nheads * layer.headdim * layer.dstate * 2;
    parallel(count * layer.ngroups * parts, threads, operations, [&](int64_t task) {
        const int64_t part = task % parts, group = task / parts % layer.ngroups;
        const int64_t first = part * per_group / parts, last = (part + 1) * per_group / parts;
        const RowsPlan& plan = plans[size_t(task / parts / layer.ngroups)];
        const int64_t page = plan.write_page;
        T* x = drafts ? static_cast<T*>(drafts->x) + page * drafts->x_stride
                      : static_cast<T*>(layer.tail_x) + page * layer.tail_x_stride;
        T* B = drafts ? static_cast<T*>(drafts->B) + page * drafts->B_stride
                      : static_cast<T*>(layer.tail_B) + page * layer.tail_B_stride;
        float* dt = drafts ? drafts->dt + page * drafts->dt_stride
                           : layer.tail_dt + page * layer.tail_dt_stride;
        RowsTask<T, ST>(layer, params, rows, plan, x, B, dt, group, group * per_group + first,
                        last - first)
            .run();
    });
}

template <class T, class ST>
void decode_row(const sf_layer& layer, const sf_params& params, const sf_decode_plan& plan,
                const sf_rows& rows, int64_t threads) {
    std::vector<RowsPlan> plans;
    for (int64_t row = 0; row < plan.num_rows; ++row)
        if (plan.state_slot[row] >= 0) plans.push_back(RowsPlan::decode(plan, row));
    run_rows<T, ST>(layer, params, rows, plans, nullptr, threads);
}

template <class T, class ST>
void verify(const sf_layer& layer, const sf_params& params, const sf_verify_plan& plan,
            const sf_rows& rows, const sf_drafts& drafts, int64_t threads) {
    std::vector<RowsPlan> plans;
    for (int64_t i = 0; i < plan.num_sequences; ++i)
        plans.push_back(RowsPlan::verify(plan, i, layer.grid));
    run_rows<T, ST>(layer, params, rows, plans, &drafts, threads);
}

}  // namespace sf
