// Sixteen fp32 lanes, on whatever registers there are: the unit every sum in this library is
// written in.
//
// A sum over lanes is always "16 partial sums, then halves added to halves". So its bits are those of
// the source, not of the processor: two AVX2 registers, one AVX-512 register and plain C give the
// same. Products are fused into sums only where fma() says so (the build forbids contraction).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && !defined(SF_PORTABLE)
#define SF_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && !defined(SF_PORTABLE)
#define SF_AVX2 1
#include <immintrin.h>
#endif

// Before a loop over a tile's sums: unrolled early, they live in registers from end to end.
#define SF_UNROLL _Pragma("GCC unroll 32")
// What must not become a call: its arguments and results are registers.
#define SF_INLINE inline __attribute__((always_inline))

namespace sf {

struct bf16 {
    uint16_t bits;
};

SF_INLINE float widen(float value) { return value; }
SF_INLINE float widen(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// To nearest, ties to even; a NaN stays one.
SF_INLINE void narrow(float value, float* to) { *to = value; }
SF_INLINE void narrow(float value, bf16* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        to->bits = uint16_t((bits >> 16) | 0x40u);
    } else {
        to->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}

constexpr int LANES = 16;

constexpr int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

#if defined(SF_AVX512)

struct F16 {
    __m512 v;
};
struct M16 {
    __mmask16 m;
};

SF_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
SF_INLINE F16 set1(float a) { return {_mm512_set1_ps(a)}; }
SF_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
SF_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
// Past the caches, to a multiple of 64 bytes: for what nobody reads soon.
SF_INLINE void store_past(float* p, F16 a) { _mm512_stream_ps(p, a.v); }
SF_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
SF_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
SF_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
SF_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
SF_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SF_INLINE F16 fnma(F16 a, F16 b, F16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// b where a is not a number: so max(limit, x) keeps a NaN of x.
SF_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
SF_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
SF_INLINE M16 less(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
SF_INLINE F16 select(M16 m, F16 yes, F16 no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
SF_INLINE F16 round_even(F16 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SF_INLINE F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
// a * 2^n for whole n that keep the result a normal number.
SF_INLINE F16 scale(F16 a, F16 n) {
    __m512i e = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), e))};
}
SF_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }
SF_INLINE F16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
SF_INLINE void store_n(float* p, F16 a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
SF_INLINE F16 widen16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
SF_INLINE F16 load(const bf16* p) { return widen16(_mm256_loadu_si256((const __m256i*)p)); }
SF_INLINE F16 load_n(const bf16* p, int n) {
    return widen16(_mm256_maskz_loadu_epi16(first(n), p));
}
SF_INLINE __m256i narrow16(F16 a) {
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
SF_INLINE void store(bf16* p, F16 a) { _mm256_storeu_si256((__m256i*)p, narrow16(a)); }
SF_INLINE void store_n(bf16* p, F16 a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow16(a)); }
// Elements 0, 2, 4, .. and 1, 3, 5, .. of 32.
SF_INLINE void load_pairs(const bf16* p, F16& even, F16& odd) {
    __m512i both = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
}
SF_INLINE __m128 quarter_sums(F16 a) {
    __m256 low = _mm512_castps512_ps256(a.v);
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
    __m256 eight = _mm256_add_ps(low, high);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

#elif defined(SF_AVX2)

struct F16 {
    __m256 lo, hi;
};
struct M16 {
    __m256 lo, hi;
};

SF_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SF_INLINE F16 set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
SF_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SF_INLINE void store(float* p, F16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
// Past the caches, to a multiple of 64 bytes: for what nobody reads soon.
SF_INLINE void store_past(float* p, F16 a) {
    _mm256_stream_ps(p, a.lo);
    _mm256_stream_ps(p + 8, a.hi);
}
#define SF_BINARY(name, op) \
    SF_INLINE F16 name(F16 a, F16 b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
SF_BINARY(add, _mm256_add_ps)
SF_BINARY(sub, _mm256_sub_ps)
SF_BINARY(mul, _mm256_mul_ps)
SF_BINARY(div, _mm256_div_ps)
// b where a is not a number: so max(limit, x) keeps a NaN of x.
SF_BINARY(max, _mm256_max_ps)
SF_BINARY(min, _mm256_min_ps)
#undef SF_BINARY
SF_INLINE F16 fma(F16 a, F16 b, F16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SF_INLINE F16 fnma(F16 a, F16 b, F16 c) {
    return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
SF_INLINE M16 less(F16 a, F16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
SF_INLINE F16 select(M16 m, F16 yes, F16 no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
SF_INLINE F16 round_even(F16 a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
SF_INLINE F16 abs(F16 a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
SF_INLINE __m256 scale8(__m256 a, __m256 n) {
    __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), e));
}
// a * 2^n for whole n that keep the result a normal number.
SF_INLINE F16 scale(F16 a, F16 n) { return {scale8(a.lo, n.lo), scale8(a.hi, n.hi)}; }
SF_INLINE __m256i first8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SF_INLINE F16 load_n(const float* p, int n) {
    return {_mm256_maskload_ps(p, first8(n)), _mm256_maskload_ps(p + 8, first8(n - 8))};
}
SF_INLINE void store_n(float* p, F16 a, int n) {
    _mm256_maskstore_ps(p, first8(n), a.lo);
    _mm256_maskstore_ps(p + 8, first8(n - 8), a.hi);
}
SF_INLINE __m256 widen8(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SF_INLINE F16 load(const bf16* p) {
    return {widen8(_mm_loadu_si128((const __m128i*)p)),
            widen8(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
SF_INLINE F16 load_n(const bf16* p, int n) {
    bf16 copy[LANES] = {};
    std::memcpy(copy, p, size_t(n) * 2);
    return load(copy);
}
SF_INLINE __m256i narrow8(__m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
SF_INLINE void store(bf16* p, F16 a) {
    __m256i both = _mm256_packus_epi32(narrow8(a.lo), narrow8(a.hi));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
SF_INLINE void store_n(bf16* p, F16 a, int n) {
    bf16 copy[LANES];
    store(copy, a);
    std::memcpy(p, copy, size_t(n) * 2);
}
// Elements 0, 2, 4, .. and 1, 3, 5, .. of 32.
SF_INLINE void load_pairs(const bf16* p, F16& even, F16& odd) {
    __m256i low = _mm256_loadu_si256((const __m256i*)p);
    __m256i high = _mm256_loadu_si256((const __m256i*)(p + 16));
    __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    even.lo = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
    even.hi = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    odd.lo = _mm256_castsi256_ps(_mm256_and_si256(low, upper));
    odd.hi = _mm256_castsi256_ps(_mm256_and_si256(high, upper));
}
SF_INLINE __m128 quarter_sums(F16 a) {
    __m256 eight = _mm256_add_ps(a.lo, a.hi);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

#else

struct F16 {
    float v[LANES];
};
struct M16 {
    bool m[LANES];
};

#define SF_LANES for (int l = 0; l < LANES; ++l)
#define SF_BINARY(name, expression)     \
    SF_INLINE F16 name(F16 a, F16 b) {     \
        F16 r;                          \
        SF_LANES r.v[l] = (expression); \
        return r;                       \
    }
SF_BINARY(add, a.v[l] + b.v[l])
SF_BINARY(sub, a.v[l] - b.v[l])
SF_BINARY(mul, a.v[l] * b.v[l])
SF_BINARY(div, a.v[l] / b.v[l])
// b where a is not a number: so max(limit, x) keeps a NaN of x.
SF_BINARY(max, a.v[l] > b.v[l] ? a.v[l] : b.v[l])
SF_BINARY(min, a.v[l] < b.v[l] ? a.v[l] : b.v[l])
#undef SF_BINARY
SF_INLINE F16 set1(float a) {
    F16 r;
    SF_LANES r.v[l] = a;
    return r;
}
SF_INLINE F16 zero() { return set1(0.0f); }
SF_INLINE F16 fma(F16 a, F16 b, F16 c) {
    F16 r;
    SF_LANES r.v[l] = __builtin_fmaf(a.v[l], b.v[l], c.v[l]);
    return r;
}
SF_INLINE F16 fnma(F16 a, F16 b, F16 c) {
    F16 r;
    SF_LANES r.v[l] = __builtin_fmaf(-a.v[l], b.v[l], c.v[l]);
    return r;
}
SF_INLINE M16 less(F16 a, F16 b) {
    M16 r;
    SF_LANES r.m[l] = a.v[l] < b.v[l];
    return r;
}
SF_INLINE F16 select(M16 m, F16 yes, F16 no) {
    F16 r;
    SF_LANES r.v[l] = m.m[l] ? yes.v[l] : no.v[l];
    return r;
}
SF_INLINE F16 round_even(F16 a) {
    F16 r;
    SF_LANES r.v[l] = __builtin_nearbyintf(a.v[l]);
    return r;
}
SF_INLINE F16 abs(F16 a) {
    F16 r;
    SF_LANES r.v[l] = __builtin_fabsf(a.v[l]);
    return r;
}
// a * 2^n for whole n that keep the result a normal number.
SF_INLINE F16 scale(F16 a, F16 n) {
    F16 r;
    SF_LANES {
        uint32_t bits;
        std::memcpy(&bits, &a.v[l], 4);
        // A NaN has no whole n; whatever is added to its bits, the caller selects it back.
        bits += uint32_t(n.v[l] == n.v[l] ? int32_t(n.v[l]) : 0) << 23;
        std::memcpy(&r.v[l], &bits, 4);
    }
    return r;
}
template <class T>
SF_INLINE F16 load_n(const T* p, int n) {
    F16 r = zero();
    for (int l = 0; l < n; ++l) r.v[l] = widen(p[l]);
    return r;
}
template <class T>
SF_INLINE F16 load(const T* p) {
    return load_n(p, LANES);
}
template <class T>
SF_INLINE void store_n(T* p, F16 a, int n) {
    for (int l = 0; l < n; ++l) narrow(a.v[l], p + l);
}
template <class T>
SF_INLINE void store(T* p, F16 a) {
    store_n(p, a, LANES);
}
SF_INLINE void store_past(float* p, F16 a) { store(p, a); }
// Elements 0, 2, 4, .. and 1, 3, 5, .. of 32.
SF_INLINE void load_pairs(const bf16* p, F16& even, F16& odd) {
    SF_LANES {
        even.v[l] = widen(p[2 * l]);
        odd.v[l] = widen(p[2 * l + 1]);
    }
}
SF_INLINE float sum(F16 a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) a.v[l] += a.v[l + half];
    return a.v[0];
}
SF_INLINE void sum4(F16 a, F16 b, F16 c, F16 d, float* to) {
    to[0] = sum(a);
    to[1] = sum(b);
    to[2] = sum(c);
    to[3] = sum(d);
}
#undef SF_LANES

#endif

#if defined(SF_AVX512) || defined(SF_AVX2)
// Before others are told of what store_past() wrote.
inline void fence_stores() { _mm_sfence(); }
#else
inline void fence_stores() {}
#endif

#if defined(SF_AVX512) || defined(SF_AVX2)
// Of the four quarter sums: 0 + 2 and 1 + 3, then the two.
SF_INLINE float sum(F16 a) {
    __m128 four = quarter_sums(a);
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
// Four sums at once, each in the order of sum().
SF_INLINE void sum4(F16 a, F16 b, F16 c, F16 d, float* to) {
    __m128 qa = quarter_sums(a), qb = quarter_sums(b), qc = quarter_sums(c), qd = quarter_sums(d);
    __m128 ab = _mm_add_ps(_mm_unpacklo_ps(qa, qb), _mm_unpackhi_ps(qa, qb));
    __m128 cd = _mm_add_ps(_mm_unpacklo_ps(qc, qd), _mm_unpackhi_ps(qc, qd));
    _mm_storeu_ps(to, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}
#endif

// out[i][j] = sum(sums[i][j]), as many at once as the registers allow.
template <int R, int C>
SF_INLINE void store_sums(const F16 (&sums)[R][C], float* out, int64_t ldo) {
    SF_UNROLL
    for (int i = 0; i < R; ++i) {
        int j = 0;
        SF_UNROLL
        for (; j + 4 <= C; j += 4)
            sum4(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3], out + i * ldo + j);
        SF_UNROLL
        for (; j < C; ++j) out[i * ldo + j] = sum(sums[i][j]);
    }
}

#if defined(SF_AVX2)
// The four quarter sums of a, then those of b.
SF_INLINE __m256 quarter_sums(F16 a, F16 b) {
    __m256 first = _mm256_add_ps(a.lo, a.hi), second = _mm256_add_ps(b.lo, b.hi);
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20),
                         _mm256_permute2f128_ps(first, second, 0x31));
}
template <int R>
SF_INLINE void store_sums(const F16 (&sums)[R][2], float* out, int64_t ldo) {
    int i = 0;
    SF_UNROLL
    for (; i + 2 <= R; i += 2) {
        // Left columns of two rows, and right ones; then side by side.
        __m256 left = quarter_sums(sums[i][0], sums[i + 1][0]);
        __m256 right = quarter_sums(sums[i][1], sums[i + 1][1]);
        __m256 two = _mm256_add_ps(_mm256_unpacklo_ps(left, right), _mm256_unpackhi_ps(left, right));
        __m256 one = _mm256_add_ps(two, _mm256_permute_ps(two, 0x4e));
        _mm_storel_pi((__m64*)(out + i * ldo), _mm256_castps256_ps128(one));
        _mm_storel_pi((__m64*)(out + (i + 1) * ldo), _mm256_extractf128_ps(one, 1));
    }
    SF_UNROLL
    for (; i < R; ++i) {
        out[i * ldo] = sum(sums[i][0]);
        out[i * ldo + 1] = sum(sums[i][1]);
    }
}
#endif

template <class T>
SF_INLINE F16 load_upto(const T* p, int64_t n) {
    return n >= LANES ? load(p) : load_n(p, int(n));
}
template <class T>
SF_INLINE void store_upto(T* p, F16 a, int64_t n) {
    if (n >= LANES)
        store(p, a);
    else
        store_n(p, a, int(n));
}

// Calls step(i, n) for vectors of [first, last), whose n elements lie at i. Twice in the code: for
// whole vectors the choice that load_upto has is made by the compiler.
template <class Step>
SF_INLINE void vectors(int64_t first, int64_t last, const Step& step) {
    int64_t i = first;
    for (; i + LANES <= last; i += LANES) step(i, int64_t(LANES));
    if (i < last) step(i, last - i);
}
#define SF_STEP __attribute__((always_inline))

}  // namespace sf
