// The activations and their slopes: whole SIMD vectors (or scalars) on the host, scalars on the device.
//
//   silu(x) = x s(x), s(x) = 1 / (1 + e^-x);  gelu(x) = x Phi(x), Phi the standard normal cdf;
//   gelu_tanh(x) = x s(2 u), u = sqrt(2/pi) (x + 0.044715 x^3), as x (1 + tanh u) / 2 = x s(2 u).
//
// Both cdfs are exact to a few roundings relative to their own size as long as they are normal numbers, far
// into the left tail (where 1 + tanh or 1 + erf would cancel). At infinity they give what torch gives.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "math.h"
#ifndef __CUDACC__
#include "simd.h"
#endif

namespace gas {

// The order is shared with ACTIVATIONS in gas_engine/ops/_native.py.
enum class Act : std::uint8_t { none = 0, silu = 1, gelu = 2, gelu_tanh = 3 };

#ifdef __CUDACC__

template <class V>
using Element = V;

// e^-|x|
GAS_HD float decay(float x) { return ::expf(-::fabsf(x)); }
GAS_HD double decay(double x) { return ::exp(-::fabs(x)); }

// cdf = Phi(x) and density = Phi'(x).
GAS_HD void normal(float x, float& cdf, float& density) {
    cdf = ::normcdff(x);
    density = 0.398942280f * ::expf(-0.5f * x * x);
}
GAS_HD void normal(double x, double& cdf, double& density) {
    cdf = ::normcdf(x);
    density = 0.39894228040143268 * ::exp(-0.5 * x * x);
}

#else

template <class V>
struct ElementOf {
    using type = std::remove_cvref_t<decltype(V{}[0])>;
};
template <class A>
    requires std::is_arithmetic_v<A>
struct ElementOf<A> {
    using type = A;
};
template <class V>
using Element = typename ElementOf<V>::type;

template <class V>
inline constexpr int kLanesOf = static_cast<int>(sizeof(V) / sizeof(Element<V>));

// e^-(a + tail) for float vectors, a >= 0, |tail| < 1/4, zero where it would be subnormal: 2^n e^r with r in
// +-ln(2)/2 (or little more). The polynomial is the minimax fit of (e^r - 1 - r) / r^2 there: 3e-9 relative.
// A NaN gives some number: callers multiply by the NaN that they came with.
template <class F>
GAS_HD F exp_minus(F a, F tail) {
    using U = Vec<std::uint32_t, kLanesOf<F>>;
    constexpr float kToInteger = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    const F shifted = kToInteger - a * 1.44269504f;
    const F n = shifted - kToInteger;
    const F r = -a - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f - tail;  // the first product is exact
    F p = 0.00138146128f * r + 0.00836871006f;
    p = p * r + 0.041668389f;
    p = p * r + 0.166665211f;
    p = p * r + 0.49999994f;
    p = p * (r * r) + r + 1.0f;
    const F e = std::bit_cast<F>(std::bit_cast<U>(p) + (std::bit_cast<U>(shifted) << 23));
    return a > 87.0f ? F{} : e;
}

template <class V>
GAS_HD V magnitude(V x) {
    if constexpr (sizeof(Element<V>) == 4)
        return std::bit_cast<V>(std::bit_cast<Vec<std::uint32_t, kLanesOf<V>>>(x) & 0x7fffffffu);
    else
        return x < 0 ? -x : x;
}

// e^-|x|. Doubles go lane by lane, as accurate as the system's library: they serve float64 tensors.
template <class V>
GAS_HD V decay(V x) {
    if constexpr (std::is_arithmetic_v<V>) {
        return decay(Vec<V, 4>{} + x)[0];
    } else if constexpr (std::is_same_v<Element<V>, float>) {
        return exp_minus(magnitude(x), V{});
    } else {
        V e{};
        for (int k = 0; k < kLanesOf<V>; ++k) e[k] = std::exp(-std::abs(x[k]));
        return e;
    }
}

// cdf = Phi(x) and density = Phi'(x). With a = |x|: Phi(-a) = e^(-a^2/2) R(a), and R a rational minimax fit
// of erfc(a/sqrt(2)) e^(a^2/2) / 2 on [0, 14.5], 5e-8 relative as rounded; all its terms are positive, so
// nothing cancels.
template <class V>
GAS_HD void normal(V x, V& cdf, V& density) {
    if constexpr (std::is_arithmetic_v<V>) {
        Vec<V, 4> wide_cdf, wide_density;
        normal(Vec<V, 4>{} + x, wide_cdf, wide_density);
        cdf = wide_cdf[0], density = wide_density[0];
    } else if constexpr (std::is_same_v<Element<V>, float>) {
        using U = Vec<std::uint32_t, kLanesOf<V>>;
        V a = magnitude(x);
        a = a > 14.5f ? V{} + 14.5f : a;  // where e is zero
        // a^2 in two parts: rounded to one float, the exponent would be off by up to 50 ulp.
        const V high = std::bit_cast<V>(std::bit_cast<U>(a) & 0xfffff000u);
        const V e = exp_minus(0.5f * high * high, 0.5f * (a - high) * (a + high));
        const V top =
            (((0.00411629304f * a + 0.0406331234f) * a + 0.183234841f) * a + 0.43829456f) * a + 0.5f;
        const V bottom =
            ((((0.0103178965f * a + 0.101858579f) * a + 0.469469815f) * a + 1.20250189f) * a + 1.67447412f) *
                a +
            1.0f;
        const V tail = e * (top / bottom);
        cdf = x > 0.0f ? 1.0f - tail : tail;
        density = 0.398942280f * e;
    } else {
        for (int k = 0; k < kLanesOf<V>; ++k) {
            cdf[k] = 0.5 * std::erfc(-0.70710678118654752 * x[k]);
            density[k] = 0.39894228040143268 * std::exp(-0.5 * x[k] * x[k]);
        }
    }
}

#endif

// s(x) and 1 - s(x), from the one exponential that cannot overflow.
template <class V>
GAS_HD void sigmoid(V x, V& s, V& rest) {
    const V one = V{} + Element<V>(1);
    const V e = decay(x);
    const V larger = one / (one + e), smaller = e * larger;
    s = x < 0 ? smaller : larger;
    rest = x < 0 ? larger : smaller;
}

template <class V>
GAS_HD V clamp_to(V x, Element<V> limit) {
    const V high = V{} + limit;
    x = x > high ? high : x;
    return x < -high ? -high : x;
}

// act(x) and act'(x); the compiler drops what a caller does not use. `act` is the same for all of a tensor,
// so the branch is always predicted.
template <class V>
GAS_HD void activate_both(Act act, V x, V& value, V& slope) {
    using A = Element<V>;
    const V one = V{} + A(1);
    if (act == Act::silu) {
        V s, rest;
        sigmoid(x, s, rest);
        value = x * s;
        slope = s * (one + x * rest);
    } else if (act == Act::gelu) {
        V cdf, density;
        normal(x, cdf, density);
        value = x * cdf;
        slope = cdf + x * density;
    } else if (act == Act::gelu_tanh) {
        constexpr A kLinear = A(1.5957691216057308);  // 2 sqrt(2/pi)
        constexpr A kCubic = A(0.044715) * kLinear;
        const V z = clamp_to(x, A(32)), square = z * z;  // s(2u) is 0 or 1 before the limit is met
        V s, rest;
        sigmoid(z * (kLinear + kCubic * square), s, rest);
        value = x * s;
        slope = s * (one + z * rest * (kLinear + 3 * kCubic * square));
    } else {
        value = x;
        slope = one;
    }
}

template <class V>
GAS_HD V activate(Act act, V x) {
    V value, slope;
    activate_both(act, x, value, slope);
    return value;
}

template <class V>
GAS_HD V activate_slope(Act act, V x) {
    V value, slope;
    activate_both(act, x, value, slope);
    return slope;
}

}  // namespace gas
