// What Python hands over: addresses, sizes and strides in elements. Mirrors native/structs.py.
#pragma once

#include <cstdint>

enum { SF_FLOAT32 = 0, SF_BFLOAT16 = 1 };

struct sf_layer {
    // Pools: base address and the stride of their first dimension; the rest is contiguous.
    void* ssm_state;
    int64_t ssm_stride;
    void* conv_state;
    int64_t conv_stride;
    void* tail_xBC;
    int64_t tail_xBC_stride;
    void* tail_x;
    int64_t tail_x_stride;
    void* tail_B;
    int64_t tail_B_stride;
    float* tail_dt;
    int64_t tail_dt_stride;
    int64_t nheads, headdim, dstate, ngroups, conv_dim, window, grid;
    int64_t activation, state;  // dtypes
};

struct sf_drafts {
    void* xBC;
    int64_t xBC_stride;
    void* x;
    int64_t x_stride;
    void* B;
    int64_t B_stride;
    float* dt;
    int64_t dt_stride;
};

struct sf_params {
    const float* A;
    const float* D;        // or null
    const float* dt_bias;  // or null
    int64_t dt_softplus;
    double dt_min, dt_max;
};

struct sf_conv {
    const float* taps;  // (window + 1, conv_dim)
    const float* bias;  // (conv_dim,) or null
};

// A batch's rows: x (rows, nheads, headdim) and so on, whose first strides are arbitrary.
struct sf_rows {
    const void* x;
    int64_t x_stride;
    const void* dt;
    int64_t dt_stride;
    int64_t dt_dtype;
    const void* B;
    int64_t B_stride;
    const void* C;
    int64_t C_stride;
    const void* z;  // or null
    int64_t z_stride;
    void* out;
    int64_t out_stride;
};

struct sf_columns {
    const void* xBC;
    int64_t xBC_stride;
    void* out;
    int64_t out_stride;
};

struct sf_extend_plan {
    int64_t num_sequences;
    const int64_t *start, *length, *offset, *state_slot, *tail_page;
    const int64_t* first_boundary;  // (num_sequences + 1,)
    const int64_t *boundary_position, *boundary_slot;
};

struct sf_decode_plan {
    int64_t num_rows;
    const int64_t *state_slot, *tail_page, *tail_row;
};

struct sf_commit_plan {
    int64_t num_rows;
    const int64_t *src_slot, *dst_slot, *tail_page, *tail_rows;
};

struct sf_verify_plan {
    int64_t num_sequences;
    const int64_t *state_slot, *tail_page, *tail_rows, *draft_page;
    const int64_t* first_node;  // (num_sequences + 1,)
    const int64_t* parent;
};

struct sf_accept_plan {
    int64_t num_sequences;
    const int64_t *state_slot, *tail_page, *tail_rows, *draft_page, *boundary_slot;
    const int64_t* first_node;  // (num_sequences + 1,)
    const int64_t* node;
};
