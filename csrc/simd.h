// Host vectors: `Vec<A, W>` holds W lanes of A (compiler vectors, so one source serves SSE, AVX2, AVX-512 and
// NEON), with loads and stores that convert between storage and accumulation types. W lanes of Acc<T> fill
// one register.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "dtypes.h"

namespace gas {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc<T>));

template <class A, int W>
struct VecOf {
    typedef A type __attribute__((vector_size(W * sizeof(A))));
};
template <class A, int W>
using Vec = typename VecOf<A, W>::type;

// The conversions below are branch-free on whole vectors: F holds floats, U the same number of 32-bit words.

template <class F, class U>
GAS_HD F from_bf16(U h) {
    return std::bit_cast<F>(h << 16);
}

template <class F, class U>
GAS_HD U to_bf16(F v) {
    const U u = std::bit_cast<U>(v);
    const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // nearest, ties to even
    return v != v ? U{} + 0x7fc0u : rounded;                   // a NaN stays one
}

template <class F, class U>
GAS_HD F from_f16(U h) {
    const U magnitude = (h & 0x7fffu) << 13;
    // Scaling by 2^112 moves the exponent bias from 15 to 127, exactly, subnormal numbers included.
    const U scaled = std::bit_cast<U>(std::bit_cast<F>(magnitude) * 0x1p112f);
    const U finite_or_not = magnitude >= 0x0f800000u ? scaled | 0x7f800000u : scaled;
    return std::bit_cast<F>(finite_or_not | ((h & 0x8000u) << 16));
}

template <class F, class U>
GAS_HD U to_f16(F v) {
    const U u = std::bit_cast<U>(v);
    const U magnitude = u & 0x7fffffffu;
    // Subnormal results: adding 1/2 leaves the ten low bits rounded in place by the float adder.
    const U tiny = std::bit_cast<U>(std::bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
    const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const U small = magnitude < 0x38800000u ? tiny : normal;
    const U large = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;  // NaN, or overflow to infinity
    return (magnitude >= 0x47800000u ? large : small) | ((u & 0x80000000u) >> 16);
}

// W 16-bit elements to floats and back. Where the machine has an instruction for it, the compiler does not
// always find it.
template <class T, int W>
GAS_HD Vec<float, W> widen_lanes(Vec<std::uint16_t, W> h) {
    using F = Vec<float, W>;
#if defined(__AVX512F__)
    if constexpr (W == 16) {
        const auto bits = std::bit_cast<__m256i>(h);
        if constexpr (std::is_same_v<T, f16>) return std::bit_cast<F>(_mm512_cvtph_ps(bits));
        return std::bit_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
#endif
#if defined(__AVX2__) && defined(__F16C__)
    if constexpr (W == 8) {
        const auto bits = std::bit_cast<__m128i>(h);
        if constexpr (std::is_same_v<T, f16>) return std::bit_cast<F>(_mm256_cvtph_ps(bits));
        return std::bit_cast<F>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
#endif
    const auto wide = __builtin_convertvector(h, Vec<std::uint32_t, W>);
    if constexpr (std::is_same_v<T, bf16>)
        return from_bf16<F>(wide);
    else
        return from_f16<F>(wide);
}

template <class T, int W>
GAS_HD Vec<std::uint16_t, W> narrow_lanes(Vec<float, W> v) {
    using U = Vec<std::uint32_t, W>;
    using Raw = Vec<std::uint16_t, W>;
    constexpr bool half = std::is_same_v<T, f16>;
#if defined(__AVX512F__)
    if constexpr (W == 16) {
        if constexpr (half) return std::bit_cast<Raw>(_mm512_cvtps_ph(std::bit_cast<__m512>(v), 0));
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
        // The instruction takes subnormal numbers for zero, and keeps the bits of a NaN.
        constexpr int kSubnormalOrNaN = 0x20 | 0x01 | 0x80;
        if (_mm512_fpclass_ps_mask(std::bit_cast<__m512>(v), kSubnormalOrNaN) == 0) [[likely]]
            return std::bit_cast<Raw>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(v)));
#endif
        return std::bit_cast<Raw>(
            _mm512_cvtepi32_epi16(std::bit_cast<__m512i>(to_bf16<Vec<float, W>, U>(v))));
    }
#endif
#if defined(__AVX2__) && defined(__F16C__)
    if constexpr (W == 8 && half) return std::bit_cast<Raw>(_mm256_cvtps_ph(std::bit_cast<__m256>(v), 0));
#endif
    if constexpr (half)
        return __builtin_convertvector((to_f16<Vec<float, W>, U>(v)), Raw);
    else
        return __builtin_convertvector((to_bf16<Vec<float, W>, U>(v)), Raw);
}

// Load W elements as Acc<T>; unless Full, only `count` of them (clamped to 0..W), and zeros.
template <bool Full, class T, int W = kLanes<T>>
GAS_HD Vec<Acc<T>, W> load(const T* p, std::int64_t count) {
    using Raw = std::conditional_t<sizeof(T) == 2, std::uint16_t, T>;
    Vec<Raw, W> raw{};
    if constexpr (Full) {
        std::memcpy(&raw, p, sizeof raw);
    } else if (count > 0) {
        std::memcpy(&raw, p, sizeof(T) * static_cast<std::size_t>(count < W ? count : W));
    }
    if constexpr (sizeof(T) != 2) {
        return raw;
    } else {
        return widen_lanes<T, W>(raw);
    }
}

// A result too large for the caches to hold until somebody reads it goes around them: that spares reading the
// lines it overwrites. Each thread ends such writes with stream_fence().
inline constexpr std::int64_t kStreamFrom = std::int64_t{8} << 20;  // bytes

inline bool streams(const void* p, std::int64_t bytes) {
#if defined(__SSE2__)
    return bytes >= kStreamFrom && reinterpret_cast<std::uintptr_t>(p) % kVectorBytes == 0;
#else
    (void)p;
    return bytes < 0;
#endif
}

inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

template <bool Stream, class R>
GAS_HD void put(void* p, const R& raw) {
#if defined(__AVX512F__)
    if constexpr (Stream && sizeof(R) == 64)
        return _mm512_stream_si512(static_cast<__m512i*>(p), std::bit_cast<__m512i>(raw));
#endif
#if defined(__AVX__)
    if constexpr (Stream && sizeof(R) == 32)
        return _mm256_stream_si256(static_cast<__m256i*>(p), std::bit_cast<__m256i>(raw));
#endif
#if defined(__SSE2__)
    if constexpr (Stream && sizeof(R) == 16)
        return _mm_stream_si128(static_cast<__m128i*>(p), std::bit_cast<__m128i>(raw));
#endif
    std::memcpy(p, &raw, sizeof raw);
}

// Store W lanes as T; unless Full, only `count` of them (clamped to 0..W).
template <bool Full, class T, class V, int W, bool Stream = false>
GAS_HD void store_lanes(T* p, V v, std::int64_t count) {
    using Raw = std::conditional_t<sizeof(T) == 2, std::uint16_t, T>;
    Vec<Raw, W> raw;
    if constexpr (sizeof(T) != 2) {
        raw = __builtin_convertvector(v, Vec<Raw, W>);
    } else {
        raw = narrow_lanes<T, W>(__builtin_convertvector(v, Vec<float, W>));
    }
    if constexpr (Full) {
        put<Stream>(p, raw);
    } else if (count > 0) {
        std::memcpy(p, &raw, sizeof(T) * static_cast<std::size_t>(count < W ? count : W));
    }
}

// The same for storage whose type is known at run time, with lanes of A. The branch is the same for all
// vectors of a tensor, so it is always predicted. A dozen streams are more than the hardware follows by
// itself: what comes sixteen lines later is asked for here, into the second level of cache. Large arrays
// start at one offset within their pages, so that all streams meet in a few sets of the first level, and what
// waits there is thrown out before it is read.
template <bool Full, class A, int W, int U>
GAS_HD void load_as(DType dtype, const void* p, std::int64_t at, std::int64_t count, Vec<A, W> (&v)[U]) {
    const auto from = [&]<class T>(T) {
        const T* q = static_cast<const T*>(p) + at;
        for (int u = 0; u < U; ++u) {
            if constexpr (Full) __builtin_prefetch(q + u * W + 1024 / sizeof(T), 0, 2);
            v[u] = __builtin_convertvector((load<Full, T, W>(q + u * W, count - u * W)), Vec<A, W>);
        }
    };
    switch (dtype) {
        case DType::f64:
            return from(double{});
        case DType::bf16:
            return from(bf16{});
        case DType::f16:
            return from(f16{});
        default:
            return from(float{});
    }
}

template <bool Full, class A, int W = kLanes<A>>
GAS_HD Vec<A, W> load_as(DType dtype, const void* p, std::int64_t at, std::int64_t count) {
    Vec<A, W> v[1];
    load_as<Full, A, W>(dtype, p, at, count, v);
    return v[0];
}

template <bool Full, bool Stream, class A, int W = kLanes<A>>
GAS_HD void store_as(DType dtype, void* p, std::int64_t at, Vec<A, W> v, std::int64_t count) {
    const auto to = [&]<class T>(T) {
        store_lanes<Full, T, Vec<A, W>, W, Stream>(static_cast<T*>(p) + at, v, count);
    };
    switch (dtype) {
        case DType::f64:
            return to(double{});
        case DType::bf16:
            return to(bf16{});
        case DType::f16:
            return to(f16{});
        default:
            return to(float{});
    }
}

}  // namespace gas
