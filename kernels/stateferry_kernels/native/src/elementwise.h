// exp and what is made of it. One implementation for every lane of every kernel, so that an
// element's bits depend on the element alone.
#pragma once

#include "simd.h"

namespace sf {

// exp of what is within its range; n and r of the middle are all that its bits depend on.
SF_INLINE F16 exp_inside(F16 inside) {
    F16 n = round_even(mul(inside, set1(1.44269504f)));
    // ln 2 in two parts: n * 0.693359375 is exact.
    F16 r = fnma(n, set1(0.693359375f), inside);
    r = fnma(n, set1(-2.12194440e-4f), r);
    // Taylor's series to r^7: the next term is below 6e-9 for |r| <= ln 2 / 2.
    F16 p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return scale(p, n);
}

constexpr float EXP_LOWEST = -87.3365f, EXP_HIGHEST = 88.3762f;

// Relative error below 1e-7. Below the smallest normal number 0; above 88.37 infinity.
SF_INLINE F16 exp(F16 x) {
    const F16 low = set1(EXP_LOWEST), high = set1(EXP_HIGHEST);
    F16 y = exp_inside(min(high, max(low, x)));
    y = select(less(x, low), zero(), y);
    y = select(less(high, x), set1(INFINITY), y);
    // Only a NaN differs from itself in both directions.
    M16 under = less(x, set1(INFINITY));
    return select(under, y, add(x, x));
}

// The same bits for x <= 0, and a NaN for a NaN: scale() leaves one alone.
SF_INLINE F16 exp_of_negative(F16 x) {
    const F16 low = set1(EXP_LOWEST);
    return select(less(x, low), zero(), exp_inside(max(low, x)));
}

SF_INLINE F16 silu(F16 x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// log(1 + exp(x)) = max(x, 0) + log1p(u), u = exp(-|x|);  log1p(u) = 2 atanh(u / (2 + u)).
SF_INLINE F16 softplus(F16 x) {
    F16 u = exp(sub(zero(), abs(x)));
    F16 s = div(u, add(set1(2.0f), u));
    F16 s2 = mul(s, s);
    // atanh's series to s^15; s <= 1/3, so the next term is below 2e-9 of the first.
    F16 p = set1(1.0f / 15);
    p = fma(p, s2, set1(1.0f / 13));
    p = fma(p, s2, set1(1.0f / 11));
    p = fma(p, s2, set1(1.0f / 9));
    p = fma(p, s2, set1(1.0f / 7));
    p = fma(p, s2, set1(1.0f / 5));
    p = fma(p, s2, set1(1.0f / 3));
    p = fma(p, s2, set1(1.0f));
    return add(max(zero(), x), mul(mul(set1(2.0f), s), p));
}

SF_INLINE float exp(float x) {
    float lanes[LANES];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

}  // namespace sf
