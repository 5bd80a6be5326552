// The plain selective state update: one token at a time, the whole state read and written.
#pragma once

#include <algorithm>
#include <cstring>

#include "abi.h"
#include "interval.h"
#include "support.h"

struct sf_steps {
    int64_t num_sequences, num_steps;
    int64_t num_slots, num_step_rows;
    const int32_t* state_slot;
    void* ssm_state;
    int64_t ssm_stride;
    int64_t nheads, headdim, dstate, ngroups;
    int64_t activation, state;
    // Per-step states (rows, num_steps, nheads, headdim, dstate), or null.
    void* step_states;
    int64_t step_stride;
    const int32_t* step_slot;
    const int32_t* parent;  // (num_sequences, num_steps) or null
    int64_t write_state;
};

namespace sf {

// Up to so many bytes of a layer's states, those of all layers are likely to be in the last cache.
// From there it pays to ask for each line, so many elements ahead (a fifth at batch 1); from memory
// the processor asks for enough by itself, and asking beside it is 5 % slower.
constexpr int64_t STEP_NEAR_BYTES = 2 << 20;
constexpr int64_t STEP_AHEAD = 1024;

// One row of a state: next = state * decay + (dt x) B, stored as ST, and in fp32 at `carried` where
// CARRY says so. Returns next . C, before any rounding. One row after the other: memory gives most
// to whoever reads one line after the other.
template <bool CARRY, bool NEAR, class From, class ST>
SF_INLINE float step_row(const From* state, int64_t N, F16 decay, F16 dtx, const float* B,
                         const float* C, ST* next, float* carried) {
    F16 y = zero();
    auto vector = [&](int64_t n, int64_t count) __attribute__((always_inline)) {
        if (NEAR) __builtin_prefetch(state + n + STEP_AHEAD, 1);
        F16 s = load_upto(state + n, count);
        s = fma(s, decay, mul(dtx, load(B + n)));
        store_upto(next + n, s, count);
        if (CARRY) store_upto(carried + n, s, count);
        y = fma(s, load(C + n), y);
    };
    int64_t n = 0;
    for (; n + LANES <= N; n += LANES) vector(n, LANES);
    if (n < N) vector(n, N - n);
    return sum(y);
}

// Heads [first, last) of sequence i, each through all its steps. A chain carries its state in fp32
// from step to step; a tree takes up the states as they were stored.
template <class T, class ST>
class StepsTask {
public:
    StepsTask(const sf_steps& steps, const sf_params& params, const sf_rows& rows, int64_t i,
              int64_t first, int64_t last)
        : steps_(steps), params_(params), rows_(rows), i_(i), first_(first), last_(last),
          P_(steps.headdim), N_(steps.dstate), heads_(last - first),
          saves_(steps.step_states && steps.step_slot[i] >= 0),
          tree_(saves_ && steps.parent),
          near_(steps.num_sequences * steps.nheads * P_ * N_ * int64_t(sizeof(ST)) <=
                STEP_NEAR_BYTES) {}

    void run() {
        if (steps_.state_slot[i_] < 0) return;
        allocate();
        const int64_t size = rows_.dt_dtype == SF_BFLOAT16 ? 2 : 4;
        for (int64_t t = 0; t < steps_.num_steps; ++t)
            process_dt(static_cast<const char*>(rows_.dt) + row(t) * rows_.dt_stride * size,
                       rows_.dt_dtype, first_, last_, params_, dt_ + t * round_up(heads_));
        for (int64_t h = first_; h < last_; ++h)
            for (int64_t t = 0; t < steps_.num_steps; ++t) step(h, t);
    }

private:
    int64_t row(int64_t t) const { return i_ * steps_.num_steps + t; }

    void allocate() {
        const int64_t ldn = round_up(N_), ldx = round_up(P_);
        const int64_t dts = steps_.num_steps * round_up(heads_);
        Scratch& scratch = Scratch::of_thread();
        scratch.reserve(scratch_bytes(ldn * 4, ldn * 4, ldx * 4, ldx * 4, ldx * 4, dts * 4,
                                      P_ * N_ * int64_t(sizeof(ST)), P_ * N_ * 4));
        B_ = scratch.take<float>(ldn);
        C_ = scratch.take<float>(ldn);
        x_ = scratch.take<float>(ldx);
        dtx_ = scratch.take<float>(ldx);
        y_ = scratch.take<float>(ldx);
        dt_ = scratch.take<float>(dts);
        dropped_ = scratch.take<ST>(P_ * N_);
        carried_ = scratch.take<float>(P_ * N_);
    }

    void load_group(int64_t h, int64_t t) {
        const int64_t per_group = steps_.nheads / steps_.ngroups;
        if (steps_.num_steps == 1 && h != first_ && h % per_group) return;
        const int64_t at = h / per_group * N_;
        widen_row(static_cast<const T*>(rows_.B) + row(t) * rows_.B_stride + at, N_, B_);
        widen_row(static_cast<const T*>(rows_.C) + row(t) * rows_.C_stride + at, N_, C_);
    }

    ST* home(int64_t h) const {
        return static_cast<ST*>(steps_.ssm_state) + steps_.state_slot[i_] * steps_.ssm_stride +
               h * P_ * N_;
    }
    ST* saved(int64_t h, int64_t t) const {
        return static_cast<ST*>(steps_.step_states) + steps_.step_slot[i_] * steps_.step_stride +
               (t * steps_.nheads + h) * P_ * N_;
    }

    void step(int64_t h, int64_t t) {
        load_group(h, t);
        const float dt = dt_[t * round_up(heads_) + h - first_];
        const T* x = static_cast<const T*>(rows_.x) + row(t) * rows_.x_stride + h * P_;
        widen_row(x, P_, x_);
        widen_row(x, P_, dt, dtx_);
        const float decay = exp(dt * params_.A[h]);
        // The slot itself changes only after the last step that may read it.
        const bool last = t + 1 == steps_.num_steps;
        ST* to = saves_ ? saved(h, t) : last && steps_.write_state ? home(h) : dropped_;
        const int64_t parent = t && tree_ ? steps_.parent[row(t)] : -1;
        if (t && !tree_)
            last ? update<false>(carried_, decay, to) : update<true>(carried_, decay, to);
        else if (parent >= 0)
            update<false>(saved(h, parent), decay, to);
        else
            tree_ || last ? update<false>(home(h), decay, to) : update<true>(home(h), decay, to);
        if (saves_ && last && steps_.write_state)
            std::memcpy(home(h), to, size_t(P_ * N_) * sizeof(ST));
        const float* D = params_.D ? params_.D + h : nullptr;
        const T* z = static_cast<const T*>(rows_.z);
        T* out = static_cast<T*>(rows_.out) + row(t) * rows_.out_stride + h * P_;
        for (int64_t p = 0; p < P_; p += LANES)
            finish(zero(), load(y_ + p), 1.0f, D, load(x_ + p),
                   z ? z + row(t) * rows_.z_stride + h * P_ + p : nullptr, P_ - p, out + p);
    }

    template <bool CARRY, class From>
    void update(const From* from, float decay, ST* to) {
        near_ ? update_rows<CARRY, true>(from, decay, to)
              : update_rows<CARRY, false>(from, decay, to);
    }

    template <bool CARRY, bool NEAR, class From>
    void update_rows(const From* from, float decay, ST* to) {
        for (int64_t p = 0; p < P_; ++p)
            y_[p] = step_row<CARRY, NEAR>(from + p * N_, N_, set1(decay), set1(dtx_[p]), B_, C_,
                                          to + p * N_, carried_ + p * N_);
    }

    const sf_steps& steps_;
    const sf_params& params_;
    const sf_rows& rows_;
    const int64_t i_, first_, last_, P_, N_, heads_;
    const bool saves_, tree_, near_;
    float *B_, *C_, *x_, *dtx_, *y_, *dt_, *carried_;
    ST* dropped_;
};

// What of the plan, which comes as tensors, lies outside the memory that there is.
enum StepsFault { STEPS_FINE = 0, STEPS_STATE_SLOT = 1, STEPS_STEP_SLOT = 2, STEPS_PARENT = 3 };

inline StepsFault check_steps(const sf_steps& steps) {
    for (int64_t i = 0; i < steps.num_sequences; ++i) {
        if (steps.state_slot[i] < -1 || steps.state_slot[i] >= steps.num_slots)
            return STEPS_STATE_SLOT;
        if (steps.state_slot[i] < 0 || !steps.step_states) continue;
        if (steps.step_slot[i] < -1 || steps.step_slot[i] >= steps.num_step_rows)
            return STEPS_STEP_SLOT;
        for (int64_t t = 1; steps.parent && t < steps.num_steps; ++t) {
            const int64_t parent = steps.parent[i * steps.num_steps + t];
            if (parent < -1 || parent >= t) return STEPS_PARENT;
        }
    }
    return STEPS_FINE;
}

template <class T, class ST>
void state_steps(const sf_steps& steps, const sf_params& params, const sf_rows& rows,
                 int64_t threads) {
    const int64_t heads = steps.num_sequences * steps.nheads;
    const int64_t operations = heads * steps.num_steps * steps.headdim * steps.dstate * 2;
    const int64_t piece = std::clamp<int64_t>(heads / (16 * threads), 1, steps.nheads);
    // A thread's heads lie one after the other: what it fetches ahead is what it comes to next.
    parallel_stretches(heads, piece, threads, operations, [&](int64_t head, int64_t end) {
        while (head < end) {
            const int64_t i = head / steps.nheads, first = head % steps.nheads;
            const int64_t last = std::min(steps.nheads, first + end - head);
            StepsTask<T, ST>(steps, params, rows, i, first, last).run();
            head += last - first;
        }
    });
}

}  // namespace sf
