// Host side of resample2d: the pass down the columns, and moves of lanes that all layouts share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "resample2d.h"
#include "simd.h"

namespace gas {

template <class V, int... I>
GAS_HD std::pair<V, V> deinterleave(V a, V b, std::integer_sequence<int, I...>) {
    return {__builtin_shufflevector(a, b, 2 * I...), __builtin_shufflevector(a, b, 2 * I + 1 ...)};
}

template <class V, int... I>
GAS_HD std::pair<V, V> interleave(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int W = sizeof...(I);
    return {__builtin_shufflevector(a, b, I / 2 + I % 2 * W...),
            __builtin_shufflevector(a, b, W / 2 + I / 2 + I % 2 * W...)};
}

// W lanes of two vectors that lie side by side, from lane First on.
template <int First, class V, int... I>
GAS_HD V across(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, First + I...);
}

// W vectors of W lanes: log2 W rounds of the perfect shuffle exchange rows and columns.
template <class V, int W>
GAS_HD void transpose(V (&v)[W]) {
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        V next[W];
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; ++i)
            std::tie(next[2 * i], next[2 * i + 1]) =
                interleave(v[i], v[i + W / 2], std::make_integer_sequence<int, W>{});
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = next[i];
    }
}

// Lanes from `count` on become zero, whatever they hold.
template <class V>
GAS_HD V first_lanes(V v, std::int64_t count) {
    for (int lane = 0; lane < static_cast<int>(sizeof v / sizeof v[0]); ++lane)
        v[lane] = lane < count ? v[lane] : 0;
    return v;
}

// Call body with the number of taps as a constant where it is a frequent one, else with 0.
template <class Body>
GAS_HD void with_taps(int count, Body&& body) {
    switch (count) {
        case 2:
            return body(std::integral_constant<int, 2>{});
        case 4:
            return body(std::integral_constant<int, 4>{});
        default:
            return body(std::integral_constant<int, 0>{});
    }
}

// The rows of x that one row of y is made of, clipped to the image.
template <class T>
struct Column {
    const T* first;
    std::int64_t pitch;
    const Acc<T>* taps;
    int count;
    std::int64_t readable;  // elements that lie in the tensor from the last row's first one on

    Column(const Resample2dArgs& args, const Phases<Acc<T>>& f, std::int64_t plane, std::int64_t o) {
        const int mask = f.phases - 1, s = static_cast<int>(o & mask);
        const std::int64_t top = (o >> mask) * f.step + f.first[s];
        const int from = static_cast<int>(std::max<std::int64_t>(0, -top));
        count = static_cast<int>(std::min<std::int64_t>(f.count[s], args.height - top)) - from;
        taps = f.taps[s] + from;
        pitch = args.width * args.inner;
        first = static_cast<const T*>(args.x) + (plane * args.height + top + from) * pitch;
        readable = ((args.planes - plane) * args.height - top - from - count + 1) * pitch;
    }
};

// Their filtered sum, with N rows (or, for 0, as many as there are). It holds copies: for all the compiler
// knows, stores of results might change what is not local to a loop.
template <class T, int N>
class ColumnSum {
    static constexpr int W = kLanes<T>;
    using V = Vec<Acc<T>, W>;

  public:
    explicit ColumnSum(const Column<T>& column)
        : first_(column.first),
          pitch_(column.pitch),
          count_(N > 0 ? N : column.count),
          readable_(column.readable) {
#pragma GCC unroll 4
        for (int j = 0; j < count_; ++j) taps_[j] = column.taps[j];
    }

    // One vector of the row, of which `left` lanes count.
    GAS_HD V operator()(std::int64_t at, std::int64_t left) const {
        V total{};
        if (at + W <= readable_) {  // over the end of the row, rather than in parts
#pragma GCC unroll 4
            for (int j = 0; j < count_; ++j) total += taps_[j] * load<true>(first_ + j * pitch_ + at, left);
        } else {
            for (int j = 0; j < count_; ++j) total += taps_[j] * load<false>(first_ + j * pitch_ + at, left);
        }
        return total;
    }

  private:
    const T* first_;
    std::int64_t pitch_;
    Acc<T> taps_[N > 0 ? N : kMaxTaps];
    int count_;
    std::int64_t readable_;
};

// Store the lanes that count, or all where they end before `end`: what follows a row is written after it.
template <class T, bool Stream = false>
GAS_HD void store_before(T* y, std::int64_t at, Vec<Acc<T>, kLanes<T>> v, std::int64_t left,
                         std::int64_t end) {
    constexpr int W = kLanes<T>;
    if (at + W <= end)
        store_lanes<true, T, Vec<Acc<T>, W>, W, Stream>(y + at, v, left);
    else
        store_lanes<false, T, Vec<Acc<T>, W>, W>(y + at, v, left);
}

}  // namespace gas
