#include "reversible.h"

#include <algorithm>

#include "simd.h"

namespace gas {
namespace {

constexpr std::int64_t kChunk = 4096;
constexpr std::int64_t kParallelFrom = 32768;

// Elements of T as lanes of signed integers: 64 bits for double, 32 for all others (16-bit types
// sign-extended).
template <class T>
using Lane = std::conditional_t<std::is_same_v<T, double>, std::int64_t, std::int32_t>;
template <class T>
using Raw = std::conditional_t<sizeof(T) == 2, std::int16_t, Lane<T>>;
template <class T>
using Ints = Vec<Lane<T>, kLanes<T>>;
template <class T>
using Values = Vec<Acc<T>, kLanes<T>>;

template <class T>
GAS_HD Ints<T> ordered_of(Ints<T> bits) {
    constexpr Lane<T> magnitude = static_cast<Lane<T>>((std::uint64_t{1} << (8 * sizeof(T) - 1)) - 1);
    return ordered(bits, 8 * sizeof(Lane<T>) - 1, magnitude);
}

template <bool Full, class T, class I>
GAS_HD auto load_ints(const void* p, std::int64_t at, std::int64_t count) {
    Vec<I, kLanes<T>> raw{};
    const std::int64_t lanes = Full ? kLanes<T> : std::clamp<std::int64_t>(count, 0, kLanes<T>);
    std::memcpy(&raw, static_cast<const I*>(p) + at, sizeof(I) * static_cast<std::size_t>(lanes));
    return __builtin_convertvector(raw, Ints<T>);
}

template <bool Full, class T, class I>
GAS_HD void store_ints(void* p, std::int64_t at, Ints<T> value, std::int64_t count) {
    const auto raw = __builtin_convertvector(value, Vec<I, kLanes<T>>);
    const std::int64_t lanes = Full ? kLanes<T> : std::clamp<std::int64_t>(count, 0, kLanes<T>);
    std::memcpy(static_cast<I*>(p) + at, &raw, sizeof(I) * static_cast<std::size_t>(lanes));
}

// Round to T: the bits, sign-extended.
template <class T>
GAS_HD Ints<T> rounded(Values<T> v) {
    Vec<Raw<T>, kLanes<T>> raw;
    store_lanes<true, T, Values<T>, kLanes<T>>(reinterpret_cast<T*>(&raw), v, kLanes<T>);
    return __builtin_convertvector(raw, Ints<T>);
}

template <bool Full, class T>
GAS_HD void block(const ReversibleArgs& args, const Acc<T>* coef, Acc<T> inverse, std::int64_t at,
                  std::int64_t left) {
    using A = Acc<T>;
    // Differences wrap around: unsigned, where that is defined.
    using Unsigned = Vec<std::make_unsigned_t<Lane<T>>, kLanes<T>>;
    const auto current = load_as<Full, A>(args.dtype, args.current, at, left);
    const auto output = load_as<Full, A>(args.output_dtype, args.output, at, left);
    if (!args.inverse) {
        const auto sum =
            reversible_next(load_as<Full, A>(args.dtype, args.previous, at, left), current, output, coef);
        store_as<Full, false, A>(args.dtype, args.next, at, sum, left);
    }
    const auto next = load_as<Full, A>(args.dtype, args.next, at, left);
    const auto guess = ordered_of<T>(rounded<T>(reversible_previous(next, current, output, coef, inverse)));
    if (args.inverse) {
        const auto code = load_ints<Full, T, std::int8_t>(args.code, at, left);
        const auto truth =
            std::bit_cast<Ints<T>>(std::bit_cast<Unsigned>(guess) + std::bit_cast<Unsigned>(code));
        store_ints<Full, T, Raw<T>>(args.previous, at, ordered_of<T>(truth), left);
    } else {
        const auto truth = ordered_of<T>(load_ints<Full, T, Raw<T>>(args.previous, at, left));
        const auto difference = std::bit_cast<Unsigned>(truth) - std::bit_cast<Unsigned>(guess);
        const auto code = residual_code(std::bit_cast<Ints<T>>(difference), kEscape);
        store_ints<Full, T, std::int8_t>(args.code, at, code, left);
    }
}

template <class T>
void run(const ReversibleArgs& args, int threads) {
    Acc<T> coef[3];
    std::copy_n(args.coef, 3, coef);
    const Acc<T> inverse = 1 / coef[0];
    const std::int64_t chunks = (args.n + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.n >= kParallelFrom)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t end = std::min((chunk + 1) * kChunk, args.n);
        std::int64_t at = chunk * kChunk;
        for (; at + kLanes<T> <= end; at += kLanes<T>) block<true, T>(args, coef, inverse, at, kLanes<T>);
        if (at < end) block<false, T>(args, coef, inverse, at, end - at);
    }
}

}  // namespace

void reversible_cpu(const ReversibleArgs& args, int threads) {
    visit(args.dtype, [&]<class T>(T) { run<T>(args, threads); });
}

}  // namespace gas
