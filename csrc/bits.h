// One bit per lane: comparisons packed into words, and words spread over vectors again. Bit k is lane k.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace gas {

static_assert(std::endian::native == std::endian::little, "bit k of a word must be bit k % 8 of byte k / 8");

template <class A, int W>
using Mask = Vec<std::conditional_t<sizeof(A) == 8, std::int64_t, std::int32_t>, W>;

// 1, 2, 4, ... in lanes as wide as A.
template <class A, int W>
inline constexpr auto kLaneBits = []<int... I>(std::integer_sequence<int, I...>) {
    return Mask<A, W>{(decltype(Mask<A, W>{}[0] + 0){1} << I)...};
}(std::make_integer_sequence<int, W>{});

// Which lanes are above zero (a NaN is not).
template <class A, int W>
GAS_HD std::uint64_t positive_bits(Vec<A, W> v) {
#if defined(__AVX512F__)
    if constexpr (sizeof v == 64 && sizeof(A) == 4)
        return _mm512_cmp_ps_mask(std::bit_cast<__m512>(v), _mm512_setzero_ps(), _CMP_GT_OQ);
    if constexpr (sizeof v == 64 && sizeof(A) == 8)
        return _mm512_cmp_pd_mask(std::bit_cast<__m512d>(v), _mm512_setzero_pd(), _CMP_GT_OQ);
#endif
#if defined(__AVX__)
    if constexpr (sizeof v == 32 && sizeof(A) == 4)
        return _mm256_movemask_ps(_mm256_cmp_ps(std::bit_cast<__m256>(v), _mm256_setzero_ps(), _CMP_GT_OQ));
    if constexpr (sizeof v == 32 && sizeof(A) == 8)
        return _mm256_movemask_pd(_mm256_cmp_pd(std::bit_cast<__m256d>(v), _mm256_setzero_pd(), _CMP_GT_OQ));
#endif
    const Mask<A, W> found = (v > 0) & kLaneBits<A, W>;
    std::uint64_t bits = 0;
    for (int lane = 0; lane < W; ++lane) bits |= static_cast<std::uint64_t>(found[lane]);
    return bits;
}

// The low W bits as a comparison's result: all ones where the bit is set.
template <class A, int W>
GAS_HD Mask<A, W> spread(std::uint64_t bits) {
    using Lane = decltype(Mask<A, W>{}[0] + 0);
    return ((Mask<A, W>{} + static_cast<Lane>(bits & ((std::uint64_t{1} << W) - 1))) & kLaneBits<A, W>) != 0;
}

// 64 bits from bit `at` on, wherever it lies; past the last byte: zeros.
inline std::uint64_t load_bits(const std::uint8_t* bits, std::int64_t bytes, std::int64_t at) {
    const std::int64_t byte = at / 8;
    const int shift = static_cast<int>(at % 8);
    std::uint64_t low = 0, high = 0;
    if (byte + 9 <= bytes) {
        std::memcpy(&low, bits + byte, 8);
        high = bits[byte + 8];
    } else {
        std::memcpy(&low, bits + byte, static_cast<std::size_t>(std::min<std::int64_t>(8, bytes - byte)));
    }
    return shift == 0 ? low : low >> shift | high << (64 - shift);
}

// Store the low `count` bits (1..64) from a whole byte on; the rest of the last byte becomes zero.
inline void store_bits(std::uint8_t* bits, std::int64_t byte, std::uint64_t word, std::int64_t count) {
    if (count >= 64) {
        std::memcpy(bits + byte, &word, 8);
        return;
    }
    word &= (std::uint64_t{1} << count) - 1;
    std::memcpy(bits + byte, &word, static_cast<std::size_t>((count + 7) / 8));
}

}  // namespace gas
