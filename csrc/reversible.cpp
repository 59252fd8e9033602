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

// Between integers of 8 and 64 bits, halving or doubling at a time: that way the compiler finds the
// instructions.
template <class To, int W, class From>
GAS_HD Vec<To, W> convert(Vec<From, W> v) {
    if constexpr (sizeof(To) > 2 * sizeof(From) || sizeof(From) > 2 * sizeof(To)) {
        using Next = std::conditional_t<(sizeof(To) > sizeof(From)),
                                        std::conditional_t<sizeof(From) == 1, std::int16_t, std::int32_t>,
                                        std::conditional_t<sizeof(From) == 8, std::int32_t, std::int16_t>>;
        return convert<To, W, Next>(__builtin_convertvector(v, Vec<Next, W>));
    } else {
        return __builtin_convertvector(v, Vec<To, W>);
    }
}

template <bool Full, class T, class I>
GAS_HD auto load_ints(const void* p, std::int64_t at, std::int64_t count) {
    Vec<I, kLanes<T>> raw{};
    const std::int64_t lanes = Full ? kLanes<T> : std::clamp<std::int64_t>(count, 0, kLanes<T>);
    std::memcpy(&raw, static_cast<const I*>(p) + at, sizeof(I) * static_cast<std::size_t>(lanes));
    return convert<Lane<T>, kLanes<T>, I>(raw);
}

template <bool Full, class T, class I>
GAS_HD void store_ints(void* p, std::int64_t at, Ints<T> value, std::int64_t count) {
    const auto raw = convert<I, kLanes<T>, Lane<T>>(value);
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

// Pointers by value: a store of int8 may alias anything that is read through a reference.
template <class T>
struct Pointers {
    T* previous;
    const T* current;
    T* next;
    std::int8_t* code;
    DType output_dtype;
    const void* output;
    Acc<T> coef[3], inverse;
};

template <bool Full, bool Inverse, class T>
GAS_HD void block(const Pointers<T> s, std::int64_t at, std::int64_t left) {
    // Differences wrap around: unsigned, where that is defined.
    using Unsigned = Vec<std::make_unsigned_t<Lane<T>>, kLanes<T>>;
    constexpr int W = kLanes<T>;
    const auto current = load<Full>(s.current + at, left);
    const auto output = load_as<Full, Acc<T>>(s.output_dtype, s.output, at, left);
    Values<T> next;
    if constexpr (Inverse) {
        next = load<Full>(s.next + at, left);
    } else {
        const auto sum = reversible_next(load<Full>(s.previous + at, left), current, output, s.coef);
        store_lanes<Full, T, Values<T>, W>(s.next + at, sum, left);
        T stored[W];
        store_lanes<true, T, Values<T>, W>(stored, sum, W);
        next = load<true>(stored, W);
    }
    const auto guess =
        ordered_of<T>(rounded<T>(reversible_previous(next, current, output, s.coef, s.inverse)));
    if constexpr (Inverse) {
        const auto code = load_ints<Full, T, std::int8_t>(s.code, at, left);
        const auto truth = std::bit_cast<Unsigned>(guess) + std::bit_cast<Unsigned>(code);
        store_ints<Full, T, Raw<T>>(s.previous, at, ordered_of<T>(std::bit_cast<Ints<T>>(truth)), left);
    } else {
        const auto truth = ordered_of<T>(load_ints<Full, T, Raw<T>>(s.previous, at, left));
        const auto difference = std::bit_cast<Unsigned>(truth) - std::bit_cast<Unsigned>(guess);
        store_ints<Full, T, std::int8_t>(s.code, at,
                                         residual_code(std::bit_cast<Ints<T>>(difference), kEscape), left);
    }
}

template <bool Inverse, class T>
void run(const ReversibleArgs& args, int threads) {
    constexpr std::int64_t W = kLanes<T>;
    Pointers<T> states{static_cast<T*>(args.previous),
                       static_cast<const T*>(args.current),
                       static_cast<T*>(args.next),
                       args.code,
                       args.output_dtype,
                       args.output,
                       {},
                       {}};
    std::copy_n(args.coef, 3, states.coef);
    states.inverse = 1 / states.coef[0];
    const std::int64_t n = args.n, chunks = (n + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n >= kParallelFrom)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Pointers<T> s = states;
        const std::int64_t end = std::min((chunk + 1) * kChunk, n);
        std::int64_t at = chunk * kChunk;
        for (; at + W <= end; at += W) block<true, Inverse, T>(s, at, W);
        if (at < end) block<false, Inverse, T>(s, at, end - at);
    }
}

}  // namespace

void reversible_cpu(const ReversibleArgs& args, int threads) {
    visit(args.dtype,
          [&]<class T>(T) { args.inverse ? run<true, T>(args, threads) : run<false, T>(args, threads); });
}

}  // namespace gas
