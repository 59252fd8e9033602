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
#include <limits>
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

template <class V>
GAS_HD V capped(V x, V most) {
    return x > most ? most : x;
}

// e^-x
GAS_HD float decay(float x) { return ::expf(-x); }
GAS_HD double decay(double x) { return ::exp(-x); }

// e^(-x^2/2)
GAS_HD float gaussian(float x) { return ::expf(-0.5f * x * x); }
GAS_HD double gaussian(double x) { return ::exp(-0.5 * x * x); }

// top / bottom within two units in the last place; zero where bottom is above 2^126
GAS_HD float quotient(float top, float bottom) {
#ifdef __CUDA_ARCH__
    return __fdividef(top, bottom);
#else
    return top / bottom;
#endif
}
GAS_HD double quotient(double top, double bottom) { return top / bottom; }

// For numbers that are stored in 16 bits: the hardware's own functions, within 1e-6 as long as |x| < 20.
#ifdef __CUDA_ARCH__
GAS_HD float rough_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
GAS_HD float rough_inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
GAS_HD float rough_exp2(float x) { return ::exp2f(x); }
GAS_HD float rough_inverse(float x) { return 1.0f / x; }
#endif
GAS_HD float rough_decay(float x) { return rough_exp2(-1.44269504f * x); }
GAS_HD float rough_gaussian(float x) { return rough_exp2(-0.72134752f * x * x); }

GAS_HD float magnitude(float x) { return fabsf(x); }

// Phi(x)
template <class V>
GAS_HD V normal_cdf_fit(V x, V e);
GAS_HD float normal_cdf(float x, float e) { return normal_cdf_fit(x, e); }
GAS_HD double normal_cdf(double x, double) { return ::normcdf(x); }

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

template <class V>
GAS_HD V capped(V x, V most) {
#if defined(__AVX512F__)  // compilers make two instructions of the line below
    if constexpr (sizeof(V) == 64 && sizeof(Element<V>) == 4)
        return std::bit_cast<V>(_mm512_min_ps(std::bit_cast<__m512>(most), std::bit_cast<__m512>(x)));
#endif
    return x > most ? most : x;
}

// e^-(a + tail) for float vectors, |tail| < 1/4, to zero and to infinity: 2^n e^r, and r little enough for a
// polynomial, the minimax fit of (e^r - 1 - r) / r^2: 3e-9 relative. A NaN gives some number: callers
// multiply by the NaN that they came with.
template <class F>
GAS_HD F exp_minus(F a, F tail) {
    using U = Vec<std::uint32_t, kLanesOf<F>>;
    const auto rest = [&](F n) {  // the first product is exact
        return -a - n * 0x1.62ep-1f - n * 0x1.0bfbe8p-15f - tail;
    };
#if defined(__AVX512DQ__)
    if constexpr (sizeof(F) == 64) {
        // n in sixteenths, whose powers of two are a register's worth of table: |r| < ln(2)/32 needs no more
        // than two coefficients.
        alignas(64) static constexpr float kRoots[] = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f,
                                                       1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                                                       1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                                       1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
        // The smaller magnitude, with the sign of a: 105 is beyond the subnormal numbers on either side.
        a = std::bit_cast<F>(_mm512_range_ps(std::bit_cast<__m512>(a), _mm512_set1_ps(105.0f), 0b0010));
        constexpr float kToSixteenths = 0x1.8p19f;  // adding it leaves 16 n in the low bits
        const F shifted = kToSixteenths - a * 1.44269504f - tail * 1.44269504f;
        const F n = shifted - kToSixteenths, r = rest(n);
        const F root =
            std::bit_cast<F>(_mm512_permutexvar_ps(std::bit_cast<__m512i>(shifted), _mm512_load_ps(kRoots)));
        const F power = root + root * (((0.16667074f * r + 0.50001687f) * r + 1.0f) * r);
        return std::bit_cast<F>(  // which rounds n down
            _mm512_scalef_ps(std::bit_cast<__m512>(power), std::bit_cast<__m512>(n)));
    }
#endif
    constexpr float kToInteger = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    const F shifted = kToInteger - a * 1.44269504f;
    const F r = rest(shifted - kToInteger);
    F p = 0.00138146128f * r + 0.00836871006f;
    p = p * r + 0.041668389f;
    p = p * r + 0.166665211f;
    p = p * r + 0.49999994f;
    p = (p * r + 1.0f) * r + 1.0f;
    const F e = std::bit_cast<F>(std::bit_cast<U>(p) + (std::bit_cast<U>(shifted) << 23));
    const F large = a < -88.0f ? F{} + std::numeric_limits<float>::infinity() : e;
    return a > 87.0f ? F{} : large;
}

template <class V>
GAS_HD V quotient(V top, V bottom) {
    return top / bottom;
}

template <class V>
GAS_HD V magnitude(V x) {
    if constexpr (sizeof(Element<V>) == 4)
        return std::bit_cast<V>(std::bit_cast<Vec<std::uint32_t, kLanesOf<V>>>(x) & 0x7fffffffu);
    else
        return x < 0 ? -x : x;
}

// e^-x. Doubles go lane by lane, as accurate as the system's library: they serve float64 tensors.
template <class V>
GAS_HD V decay(V x) {
    if constexpr (std::is_arithmetic_v<V>) {
        return decay(Vec<V, 4>{} + x)[0];
    } else if constexpr (std::is_same_v<Element<V>, float>) {
        return exp_minus(x, V{});
    } else {
        V e{};
        for (int k = 0; k < kLanesOf<V>; ++k) e[k] = std::exp(-x[k]);
        return e;
    }
}

// e^(-x^2/2)
template <class V>
GAS_HD V gaussian(V x) {
    if constexpr (std::is_arithmetic_v<V>) {
        return gaussian(Vec<V, 4>{} + x)[0];
    } else if constexpr (std::is_same_v<Element<V>, float>) {
        using U = Vec<std::uint32_t, kLanesOf<V>>;
        const V a = capped(magnitude(x), V{} + 14.5f);  // where it is zero
        // a^2 in two parts: rounded to one float, the exponent would be off by up to 50 ulp.
        const V high = std::bit_cast<V>(std::bit_cast<U>(a) & 0xfffff000u);
        return exp_minus(0.5f * high * high, 0.5f * (a - high) * (a + high));
    } else {
        V e{};
        for (int k = 0; k < kLanesOf<V>; ++k) e[k] = std::exp(-0.5 * x[k] * x[k]);
        return e;
    }
}

template <class V>
GAS_HD V normal_cdf_fit(V x, V e);

// Phi(x), given e = e^(-x^2/2).
template <class V>
GAS_HD V normal_cdf(V x, V e) {
    if constexpr (std::is_arithmetic_v<V>) {
        return normal_cdf(Vec<V, 4>{} + x, Vec<V, 4>{} + e)[0];
    } else if constexpr (std::is_same_v<Element<V>, float>) {
        return normal_cdf_fit(x, e);
    } else {
        V cdf{};
        for (int k = 0; k < kLanesOf<V>; ++k) cdf[k] = 0.5 * std::erfc(-0.70710678118654752 * x[k]);
        return cdf;
    }
}

#endif

// Phi(x) of floats, given e = e^(-x^2/2). With a = |x|: Phi(-a) = e R(a), and R a rational minimax fit of
// erfc(a/sqrt(2)) e^(a^2/2) / 2 on [0, 14.5], 5e-8 relative as rounded; all its terms are positive, so
// nothing cancels.
template <class V>
GAS_HD V normal_cdf_fit(V x, V e) {
    const V a = capped(magnitude(x), V{} + 14.5f);
    const V top = (((0.00411629304f * a + 0.0406331234f) * a + 0.183234841f) * a + 0.43829456f) * a + 0.5f;
    const V bottom =
        ((((0.0103178965f * a + 0.101858579f) * a + 0.469469815f) * a + 1.20250189f) * a + 1.67447412f) * a +
        1.0f;
    const V tail = e * quotient(top, bottom);
    return x > 0.0f ? 1.0f - tail : tail;
}

// 2 u, the sigmoid's argument in gelu_tanh, and x (2 u)'. Beyond 32, s is 0 or 1: limited to that, x^3 stays
// finite.
template <class V>
GAS_HD V tanh_argument(V x, V& bend) {
    using A = Element<V>;
    constexpr A kLinear = A(1.5957691216057308);  // 2 sqrt(2/pi)
    constexpr A kCubic = A(0.044715) * kLinear;
    const V limit = V{} + A(32);
    x = x > limit ? limit : x;
    x = x < -limit ? -limit : x;
    bend = x * (kLinear + 3 * kCubic * x * x);
    return x * (kLinear + kCubic * x * x);
}

// The one exponential of an activation. Where it is infinite, s is zero. Rough: see above, on a device only.
template <bool Rough = false, class V>
GAS_HD V exponential(Act act, V x) {
    V bend;
    if (act == Act::none) return x;
    if (act == Act::gelu_tanh) x = tanh_argument(x, bend);
    if constexpr (Rough)
        return act == Act::gelu ? rough_gaussian(x) : rough_decay(x);
    else
        return act == Act::gelu ? gaussian(x) : decay(x);
}

template <class A>
inline constexpr A kLargest = std::numeric_limits<A>::max();

// act(x) and act'(x), given e = exponential(act, x); the compiler drops what a caller does not use. `act` is
// the same for all of a tensor, so the branch is always predicted. A loop over several e first, and then over
// several of these, keeps more of a processor's units busy than one chain from x to act(x) after the other.
template <bool Rough = false, class V>
GAS_HD void activate_from(Act act, V x, V e, V& value, V& slope) {
    using A = Element<V>;
    const V one = V{} + A(1);
    if (act == Act::gelu) {
        const V cdf = normal_cdf(x, e);
        value = x * cdf;
        slope = cdf + x * (A(0.39894228040143268) * e);
    } else if (act == Act::none) {
        value = x;
        slope = one;
    } else {
        // s(x) and 1 - s(x), where nothing cancels. An infinite e leaves s = 0, which the slope is as well.
        V s, rest;
        if constexpr (Rough) {
            s = rough_inverse(one + e);
            rest = one - s;
        } else {
            s = quotient(one, one + e);
            rest = capped(e, V{} + kLargest<A>) * s;
        }
        value = x * s;
        V bend = x;
        if (act == Act::gelu_tanh) tanh_argument(x, bend);
        slope = s * (one + rest * bend);
    }
}

template <bool Rough = false, class V>
GAS_HD void activate_both(Act act, V x, V& value, V& slope) {
    activate_from<Rough>(act, x, exponential<Rough>(act, x), value, slope);
}

template <bool Rough = false, class V>
GAS_HD V activate(Act act, V x) {
    V value, slope;
    activate_both<Rough>(act, x, value, slope);
    return value;
}

template <bool Rough = false, class V>
GAS_HD V activate_slope(Act act, V x) {
    V value, slope;
    activate_both<Rough>(act, x, value, slope);
    return slope;
}

// An activation as a constant.
template <Act A>
struct Known {
    GAS_HD constexpr operator Act() const { return A; }
};

// Calls body(Known{}): one branch for many values, which then share the processor's units.
template <class Body>
GAS_HD void with_act(Act act, Body&& body) {
    switch (act) {
        case Act::none:
            return body(Known<Act::none>{});
        case Act::silu:
            return body(Known<Act::silu>{});
        case Act::gelu:
            return body(Known<Act::gelu>{});
        case Act::gelu_tanh:
            return body(Known<Act::gelu_tanh>{});
    }
}

}  // namespace gas
