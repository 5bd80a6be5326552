// The exported functions. One translation unit, compiled once for each kind of processor.

#include "abi.h"
#include "activation.h"
#include "attention.h"
#include "commit.h"
#include "conv.h"
#include "linear.h"
#include "norm.h"
#include "rows.h"
#include "scan.h"
#include "step.h"

namespace {

using sf::bf16;

// Calls run.operator()<T, ST>() with the activations' and the states' types.
template <class Run>
void with_types(int64_t activation, int64_t state, const Run& run) {
    if (activation == SF_BFLOAT16 && state == SF_BFLOAT16)
        run.template operator()<bf16, bf16>();
    else if (activation == SF_BFLOAT16)
        run.template operator()<bf16, float>();
    else if (state == SF_BFLOAT16)
        run.template operator()<float, bf16>();
    else
        run.template operator()<float, float>();
}

}  // namespace

#define SF_EXPORT extern "C" __attribute__((visibility("default")))

// Counts up with every change of a signature or of a struct in abi.h, packed_abi.h or step.h.
SF_EXPORT int64_t sf_abi() { return 5; }

SF_EXPORT void sf_chunk_scan(const sf_layer* layer, const sf_params* params,
                             const sf_extend_plan* plan, const sf_rows* rows, int64_t threads) {
    with_types(layer->activation, layer->state, [&]<class T, class ST>() {
        sf::chunk_scan<T, ST>(*layer, *params, *plan, *rows, threads);
    });
}

SF_EXPORT void sf_decode_row(const sf_layer* layer, const sf_params* params,
                             const sf_decode_plan* plan, const sf_rows* rows, int64_t threads) {
    with_types(layer->activation, layer->state, [&]<class T, class ST>() {
        sf::decode_row<T, ST>(*layer, *params, *plan, *rows, threads);
    });
}

SF_EXPORT void sf_commit(const sf_layer* layer, const sf_params* params,
                         const sf_commit_plan* plan, int64_t threads) {
    with_types(layer->activation, layer->state, [&]<class T, class ST>() {
        sf::commit<T, ST>(*layer, *params, *plan, threads);
    });
}

SF_EXPORT void sf_verify(const sf_layer* layer, const sf_params* params,
                         const sf_verify_plan* plan, const sf_rows* rows, const sf_drafts* drafts,
                         int64_t threads) {
    with_types(layer->activation, layer->state, [&]<class T, class ST>() {
        sf::verify<T, ST>(*layer, *params, *plan, *rows, *drafts, threads);
    });
}

SF_EXPORT void sf_accept(const sf_layer* layer, const sf_params* params,
                         const sf_accept_plan* plan, const sf_drafts* drafts, int64_t threads) {
    with_types(layer->activation, layer->state, [&]<class T, class ST>() {
        sf::accept<T, ST>(*layer, *params, *plan, *drafts, threads);
    });
}

SF_EXPORT int64_t sf_state_steps(const sf_steps* steps, const sf_params* params,
                                 const sf_rows* rows, int64_t threads) {
    if (const sf::StepsFault fault = sf::check_steps(*steps)) return fault;
    with_types(steps->activation, steps->state, [&]<class T, class ST>() {
        sf::state_steps<T, ST>(*steps, *params, *rows, threads);
    });
    return sf::STEPS_FINE;
}

SF_EXPORT void sf_conv_extend(const sf_layer* layer, const sf_conv* conv,
                              const sf_extend_plan* plan, const sf_columns* columns,
                              int64_t threads) {
    if (layer->activation == SF_BFLOAT16)
        sf::conv_extend<bf16>(*layer, *conv, *plan, *columns, threads);
    else
        sf::conv_extend<float>(*layer, *conv, *plan, *columns, threads);
}

SF_EXPORT void sf_conv_row(const sf_layer* layer, const sf_conv* conv, const sf_decode_plan* plan,
                           const sf_columns* columns, int64_t threads) {
    if (layer->activation == SF_BFLOAT16)
        sf::conv_row<bf16>(*layer, *conv, *plan, *columns, threads);
    else
        sf::conv_row<float>(*layer, *conv, *plan, *columns, threads);
}

SF_EXPORT void sf_conv_verify(const sf_layer* layer, const sf_conv* conv,
                              const sf_verify_plan* plan, const sf_columns* columns,
                              const sf_drafts* drafts, int64_t threads) {
    if (layer->activation == SF_BFLOAT16)
        sf::conv_verify<bf16>(*layer, *conv, *plan, *columns, *drafts, threads);
    else
        sf::conv_verify<float>(*layer, *conv, *plan, *columns, *drafts, threads);
}

SF_EXPORT void sf_norm(const sf_norm_args* args, int64_t threads) {
    auto run = [&]<class TX, class TO>() { sf::norm<TX, TO>(*args, threads); };
    with_types(args->x_dtype, args->weight_dtype, run);
}

SF_EXPORT void sf_add_norm(const sf_add_norm_args* args, int64_t threads) {
    with_types(args->x_dtype, args->residual_dtype, [&]<class TX, class TR>() {
        if (args->weight_dtype == SF_BFLOAT16)
            sf::add_norm<TX, TR, bf16>(*args, threads);
        else
            sf::add_norm<TX, TR, float>(*args, threads);
    });
}

SF_EXPORT void sf_activation(const sf_activation_args* args, int64_t threads) {
    if (args->dtype == SF_BFLOAT16)
        sf::activation<bf16>(*args, threads);
    else
        sf::activation<float>(*args, threads);
}

SF_EXPORT void sf_cast(const sf_cast_args* args, int64_t threads) {
    with_types(args->x_dtype, args->out_dtype, [&]<class TX, class TO>() {
        sf::cast<TX, TO>(*args, threads);
    });
}

SF_EXPORT int64_t sf_rotary(const sf_rotary_args* args, int64_t threads) {
    return args->dtype == SF_BFLOAT16 ? sf::rotary<bf16>(*args, threads)
                                      : sf::rotary<float>(*args, threads);
}

SF_EXPORT void sf_linear(const sf_linear_args* args, int64_t threads) {
    if (args->dtype == SF_BFLOAT16)
        sf::linear(sf::LinearArgs<bf16>(*args), threads);
    else if (args->weight_dtype == SF_BFLOAT16)
        sf::linear(sf::LinearArgs<float, bf16>(*args), threads);
    else
        sf::linear(sf::LinearArgs<float>(*args), threads);
}

SF_EXPORT void sf_attention(const sf_kv_layer* layer, const sf_kv_plan* plan,
                            const sf_attention_rows* rows, int64_t threads) {
    if (layer->dtype == SF_BFLOAT16)
        sf::attention<bf16>(*layer, *plan, *rows, threads);
    else
        sf::attention<float>(*layer, *plan, *rows, threads);
}

namespace {

// One argument of a recorded call, as the type that the function takes.
struct Argument {
    const void* address;
    template <class A>
    operator const A*() const {
        return static_cast<const A*>(address);
    }
};

// False: it refused its input.
bool replay(const sf_call& call, int64_t threads) {
    auto argument = [&](int which) { return Argument{call.arguments[which]}; };
    switch (call.kind) {
    case SF_CALL_LINEAR: sf_linear(argument(0), threads); break;
    case SF_CALL_NORM: sf_norm(argument(0), threads); break;
    case SF_CALL_ADD_NORM: sf_add_norm(argument(0), threads); break;
    case SF_CALL_ACTIVATION: sf_activation(argument(0), threads); break;
    case SF_CALL_ROTARY: return sf_rotary(argument(0), threads) != 0;
    case SF_CALL_CAST: sf_cast(argument(0), threads); break;
    case SF_CALL_ATTENTION: sf_attention(argument(0), argument(1), argument(2), threads); break;
    case SF_CALL_CONV_ROW:
        sf_conv_row(argument(0), argument(1), argument(2), argument(3), threads);
        break;
    case SF_CALL_DECODE_ROW:
        sf_decode_row(argument(0), argument(1), argument(2), argument(3), threads);
        break;
    case SF_CALL_CONV_VERIFY:
        sf_conv_verify(argument(0), argument(1), argument(2), argument(3), argument(4), threads);
        break;
    case SF_CALL_VERIFY:
        sf_verify(argument(0), argument(1), argument(2), argument(3), argument(4), threads);
        break;
    default: return false;
    }
    return true;
}

}  // namespace

// Calls that were recorded, one after the other. Returns 0, or the number of the call, from 1, that
// refused its input.
SF_EXPORT int64_t sf_replay(const sf_call* calls, int64_t count, int64_t threads) {
    for (int64_t i = 0; i < count; ++i)
        if (!replay(calls[i], threads)) return i + 1;
    return 0;
}

// exp, silu and softplus of n elements: what every other function here builds on, for tests.
SF_EXPORT void sf_elementwise(const float* x, int64_t n, int64_t kind, float* out) {
    sf::FlushDenormals guard;
    for (int64_t i = 0; i < n; i += sf::LANES) {
        sf::F16 a = sf::load_upto(x + i, n - i);
        a = kind == 0 ? sf::exp(a) : kind == 1 ? sf::silu(a) : sf::softplus(a);
        sf::store_upto(out + i, a, n - i);
    }
}
