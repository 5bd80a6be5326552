// Arguments that Python packs anew for every call: eight bytes each, in this order
// (native/structs.py has the formats). Addresses, sizes and strides in elements.
#pragma once

#include <cstdint>

struct sf_linear_args {
    const void* x;
    int64_t x_stride, rows;
    const void* weight;
    const void* bias;  // or null
    int64_t inputs, outputs;
    void* out;
    int64_t dtype, weight_dtype;  // of x, bias and out; of the weight: the same, or bfloat16
};

struct sf_norm_args {
    const void* x;
    int64_t x_stride, x_dtype;
    const void* z;  // of x's dtype, or null
    int64_t z_stride;
    const void* weight;  // its dtype is the output's
    int64_t weight_dtype;
    double eps;
    int64_t rows, dim, group_size, kind;
    void* out;
};

struct sf_add_norm_args {
    const void* x;
    int64_t x_stride, x_dtype;
    const void* residual;
    int64_t residual_stride, residual_dtype;
    const void* weight;
    int64_t weight_dtype;
    double eps;
    int64_t rows, dim;
    void* summed;  // of the residual's dtype
    void* out;     // of the weight's
};

// One or two inputs (rows, n) to one output.
struct sf_activation_args {
    const void* x;
    int64_t x_stride;
    const void* y;  // or null
    int64_t y_stride;
    int64_t rows, n, dtype, kind;
    void* out;
};

// x (rows, n) in another dtype.
struct sf_cast_args {
    const void* x;
    int64_t x_stride, x_dtype;
    int64_t rows, n;
    void* out;
    int64_t out_dtype;
};

struct sf_rotary_args {
    const void* x;  // (rows, heads, head_dim)
    int64_t x_stride, rows, heads, head_dim, dtype;
    const float *cos, *sin;  // (max_positions, half)
    int64_t max_positions, half;
    const int64_t* position;
    void* out;
};

struct sf_kv_layer {
    // (num_pages, kv_heads, page_tokens, head_dim): base and the stride of the first dimension.
    void* keys;
    int64_t keys_stride;
    void* values;
    int64_t values_stride;
    int64_t kv_heads, page_tokens, head_dim, dtype;
};

struct sf_kv_plan {
    int64_t num_sequences;
    const int64_t *start, *length, *offset;
    const int64_t* first_page;  // (num_sequences + 1,)
    const int64_t* page;
};

// q and out (rows, num_heads, head_dim), k and v (rows, kv_heads, head_dim).
struct sf_attention_rows {
    const void* q;
    int64_t q_stride;
    const void* k;
    int64_t k_stride;
    const void* v;
    int64_t v_stride;
    void* out;
    int64_t out_stride;
    int64_t num_heads;
    double scale;
};

// A call that was recorded: which function, and its arguments before the number of threads.
enum {
    SF_CALL_LINEAR = 0,
    SF_CALL_NORM,
    SF_CALL_ADD_NORM,
    SF_CALL_ACTIVATION,
    SF_CALL_ROTARY,
    SF_CALL_CAST,
    SF_CALL_ATTENTION,
    SF_CALL_CONV_ROW,
    SF_CALL_DECODE_ROW,
    SF_CALL_CONV_VERIFY,
    SF_CALL_VERIFY
};
struct sf_call {
    int64_t kind;
    const void* arguments[5];
};
