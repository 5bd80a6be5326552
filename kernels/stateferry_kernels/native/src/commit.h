// Folding tails into fresh slots, and moving accepted drafts into tails.
#pragma once

#include <cstring>
#include <vector>

#include "abi.h"
#include "interval.h"
#include "support.h"

namespace sf {

template <class T, class ST>
void commit_heads(const sf_layer& layer, const sf_params& params, const sf_commit_plan& plan,
                  int64_t row, int64_t group, int64_t head, int64_t num_heads) {
    const int64_t P = layer.headdim, N = layer.dstate, rows = plan.tail_rows[row];
    const int64_t ldx = round_up(P), ldn = round_up(N), ldr = round_up(rows);
    const int64_t page = plan.tail_page[row];
    Scratch& scratch = Scratch::of_thread();
    scratch.reserve(scratch_bytes(rows * ldn * 4, rows * ldx * 4, ldr * 4, ldr * 4, ldr * 4));
    float* wide_B = scratch.take<float>(rows * ldn);
    float* weighted = scratch.take<float>(rows * ldx);
    float* dt = scratch.take<float>(ldr);
    float* c = scratch.take<float>(ldr);
    float* weights = scratch.take<float>(ldr);
    const T* B = static_cast<const T*>(layer.tail_B) + page * layer.tail_B_stride + group * N;
    for (int64_t s = 0; s < rows; ++s) widen_row(B + s * layer.ngroups * N, N, wide_B + s * ldn);
    for (int64_t h = head; h < head + num_heads; ++h) {
        float sum = 0.0f;
        for (int64_t s = 0; s < rows; ++s) {
            dt[s] = layer.tail_dt[page * layer.tail_dt_stride + s * layer.nheads + h];
            c[s] = sum = next_cumsum(sum, dt[s], params.A[h]);
        }
        fold_weights(c, dt, rows, weights);
        const T* x = static_cast<const T*>(layer.tail_x) + page * layer.tail_x_stride + h * P;
        for (int64_t s = 0; s < rows; ++s)
            widen_row(x + s * layer.nheads * P, P, weights[s], weighted + s * ldx);
        ST* states = static_cast<ST*>(layer.ssm_state) + h * P * N;
        fold(states + plan.src_slot[row] * layer.ssm_stride, P, N, exp(sum), weighted, ldx,
             wide_B, ldn, rows, states + plan.dst_slot[row] * layer.ssm_stride);
    }
}

// The last `window` raw columns before the position, as far back as the source slot's.
template <class T>
void commit_columns(const sf_layer& layer, const sf_commit_plan& plan, int64_t row) {
    const T* src = static_cast<const T*>(layer.conv_state) + plan.src_slot[row] * layer.conv_stride;
    T* dst = static_cast<T*>(layer.conv_state) + plan.dst_slot[row] * layer.conv_stride;
    const T* tail = static_cast<const T*>(layer.tail_xBC) +
                    plan.tail_page[row] * layer.tail_xBC_stride;
    for (int64_t k = 0; k < layer.window; ++k) {
        const int64_t from = plan.tail_rows[row] - layer.window + k;
        for (int64_t i = 0; i < layer.conv_dim; ++i)
            dst[i * layer.window + k] = from >= 0 ? tail[from * layer.conv_dim + i]
                                                  : src[i * layer.window + from + layer.window];
    }
}

template <class T, class ST>
void commit(const sf_layer& layer, const sf_params& params, const sf_commit_plan& plan,
            int64_t threads) {
    const int64_t per_group = layer.nheads / layer.ngroups;
    const int64_t parts = split(per_group, plan.num_rows * layer.ngroups, threads, 3);
    int64_t operations = 0;
    for (int64_t i = 0; i < plan.num_rows; ++i)
        operations += plan.tail_rows[i] * layer.nheads * layer.headdim * layer.dstate;
    parallel(plan.num_rows * layer.ngroups * parts, threads, operations, [&](int64_t task) {
        const int64_t part = task % parts, group = task / parts % layer.ngroups;
        const int64_t row = task / parts / layer.ngroups;
        const int64_t first = part * per_group / parts, last = (part + 1) * per_group / parts;
        commit_heads<T, ST>(layer, params, plan, row, group, group * per_group + first,
                            last - first);
        if (part == 0 && group == 0) commit_columns<T>(layer, plan, row);
    });
}

// Rows [first, last) of a sequence's accepted path -> rows [to, ..) of its tail.
template <class T>
void append_path(const sf_layer& layer, const sf_accept_plan& plan, const sf_drafts& drafts,
                 int64_t sequence, int64_t first, int64_t last, int64_t to) {
    const int64_t page = plan.tail_page[sequence], draft = plan.draft_page[sequence];
    auto move = [&](void* tail, int64_t tail_stride, const void* from, int64_t from_stride,
                    int64_t row, int64_t node, int64_t width, int64_t size) {
        std::memcpy(static_cast<char*>(tail) + (page * tail_stride + row * width) * size,
                    static_cast<const char*>(from) + (draft * from_stride + node * width) * size,
                    size_t(width * size));
    };
    for (int64_t i = first; i < last; ++i, ++to) {
        const int64_t node = plan.node[plan.first_node[sequence] + i];
        move(layer.tail_xBC, layer.tail_xBC_stride, drafts.xBC, drafts.xBC_stride, to, node,
             layer.conv_dim, sizeof(T));
        move(layer.tail_x, layer.tail_x_stride, drafts.x, drafts.x_stride, to, node,
             layer.nheads * layer.headdim, sizeof(T));
        move(layer.tail_B, layer.tail_B_stride, drafts.B, drafts.B_stride, to, node,
             layer.ngroups * layer.dstate, sizeof(T));
        move(layer.tail_dt, layer.tail_dt_stride, drafts.dt, drafts.dt_stride, to, node,
             layer.nheads, sizeof(float));
    }
}

template <class T, class ST>
void accept(const sf_layer& layer, const sf_params& params, const sf_accept_plan& plan,
            const sf_drafts& drafts, int64_t threads) {
    std::vector<int64_t> src, dst, pages;
    for (int64_t i = 0; i < plan.num_sequences; ++i) {
        const int64_t length = plan.first_node[i + 1] - plan.first_node[i];
        const int64_t room = layer.grid - plan.tail_rows[i];
        append_path<T>(layer, plan, drafts, i, 0, length < room ? length : room,
                       plan.tail_rows[i]);
        if (length < room) continue;
        src.push_back(plan.state_slot[i]);
        dst.push_back(plan.boundary_slot[i]);
        pages.push_back(plan.tail_page[i]);
    }
    std::vector<int64_t> full(src.size(), layer.grid);
    commit<T, ST>(layer, params,
                  {int64_t(src.size()), src.data(), dst.data(), pages.data(), full.data()},
                  threads);
    // Only now may the rest of a path take the place of the rows that were folded.
    for (int64_t i = 0; i < plan.num_sequences; ++i) {
        const int64_t length = plan.first_node[i + 1] - plan.first_node[i];
        const int64_t room = layer.grid - plan.tail_rows[i];
        if (length > room) append_path<T>(layer, plan, drafts, i, room, length, 0);
    }
}

}  // namespace sf
