// Host side of resample2d: the two passes over rows of NCHW images, and what the other layouts share with
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

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
template <class T>
GAS_HD void store_before(T* y, std::int64_t at, Vec<Acc<T>, kLanes<T>> v, std::int64_t left,
                         std::int64_t end) {
    constexpr int W = kLanes<T>;
    if (at + W <= end)
        store_lanes<true, T, Vec<Acc<T>, W>, W>(y + at, v, left);
    else
        store_lanes<false, T, Vec<Acc<T>, W>, W>(y + at, v, left);
}

// NCHW. The filtered row lies in a buffer between zeros; for step 2 its even and odd elements lie in two, so
// that every load along the row is contiguous.
template <class T>
class RowFilter {
    using A = Acc<T>;
    static constexpr int W = kLanes<T>;
    using V = Vec<A, W>;
    using Lanes = std::make_integer_sequence<int, W>;

  public:
    static constexpr std::int64_t kBatch = 8;

    explicit RowFilter(const Resample2dArgs& args) : args_(args), f_(phases_of<A>(args)) {
        const std::int64_t steps = (args.out_width + f_.phases - 1) / f_.phases;
        std::int64_t reach = args.width;
        for (int s = 0; s < f_.phases; ++s)
            reach = std::max(reach, (steps - 1) * f_.step + f_.first[s] + f_.count[s]);
        const std::int64_t length = (kMaxTaps + reach / f_.step + 1 + 3 * W) / W * W;
        pitch_ = f_.step * length;
        memory_.assign(kBatch * pitch_, A{});
        for (int k = 0; k < f_.step; ++k) rows_[k] = memory_.data() + k * length + kMaxTaps;
        for (int s = 0; s < f_.phases; ++s) {
            for (int j = 0; j < f_.count[s]; ++j) {
                const int at = f_.first[s] + j + f_.step * kMaxTaps;  // positive, so that / rounds down
                from_[s][j] = rows_[at % f_.step] + at / f_.step - kMaxTaps;
            }
        }
    }

    // A batch of rows of one plane: down the columns for all of them, then along, so that what was stored has
    // reached the cache when it is loaded at another offset.
    void operator()(std::int64_t plane, std::int64_t o, std::int64_t rows, std::int64_t end) {
        for (std::int64_t r = 0; r < rows; ++r) {
            const Column<T> column(args_, f_, plane, o + r);
            with_taps(column.count, [&](auto n) { down<n>(column, r * pitch_); });
        }
        const int taps = f_.phases == 1 || f_.count[0] == f_.count[1] ? f_.count[0] : 0;
        const std::int64_t begin = (plane * args_.out_height + o) * args_.out_width;
        T* const y = static_cast<T*>(args_.y) + begin;
        with_taps(taps, [&](auto n) {
            f_.phases == 1 ? along<n, 1>(y, end - begin, rows) : along<n, 2>(y, end - begin, rows);
        });
    }

  private:
    template <int N>
    void down(const Column<T>& column, std::int64_t shift) {
        const ColumnSum<T, N> sum(column);
        const std::int64_t width = args_.width;
        A *const rows = rows_[0] + shift, *const odds = rows_[1] + shift;
        const auto put = [](A* at, V v) { std::memcpy(at, &v, sizeof v); };
        std::int64_t w = 0;
        if (f_.step == 1) {
            for (; w + W <= width; w += W) put(rows + w, sum(w, W));
            if (w < width) put(rows + w, first_lanes(sum(w, width - w), width - w));
            return;
        }
        const auto pair = [&](std::int64_t left) {
            const V a = sum(w, left), b = sum(w + W, left - W);
            return deinterleave(a, b, Lanes{});
        };
        for (; w + 2 * W <= width; w += 2 * W) {
            const auto [even, odd] = pair(2 * W);
            put(rows + w / 2, even);
            put(odds + w / 2, odd);
        }
        if (w < width) {
            const auto [even, odd] = pair(width - w);
            put(rows + w / 2, first_lanes(even, (width - w + 1) / 2));
            put(odds + w / 2, first_lanes(odd, (width - w) / 2));
        }
    }

    template <int N, int P>
    void along(T* y, std::int64_t end, std::int64_t rows) const {
        constexpr int most = N > 0 ? N : kMaxTaps;
        const std::int64_t width = args_.out_width;
        const A* from[P][most];
        A taps[P][most];
        int count[P];
#pragma GCC unroll 2
        for (int s = 0; s < P; ++s) {
            count[s] = N > 0 ? N : f_.count[s];
#pragma GCC unroll 4
            for (int j = 0; j < count[s]; ++j) {
                from[s][j] = from_[s][j];
                taps[s][j] = f_.taps[s][j];
            }
        }
        const auto sum = [&](int s, std::int64_t at) {
            V total{};
#pragma GCC unroll 4
            for (int j = 0; j < count[s]; ++j) total += taps[s][j] * load<true>(from[s][j] + at, W);
            return total;
        };
        for (std::int64_t shift = 0; rows > 0; --rows, shift += pitch_, y += width, end -= width) {
            if constexpr (P == 1) {
                for (std::int64_t o = 0; o < width; o += W)
                    store_before<T>(y, o, sum(0, shift + o), width - o, end);
            } else {
                for (std::int64_t o = 0; o < width; o += 2 * W) {
                    const auto [low, high] =
                        interleave(sum(0, shift + o / 2), sum(1, shift + o / 2), Lanes{});
                    store_before<T>(y, o, low, width - o, end);
                    if (o + W < width) store_before<T>(y, o + W, high, width - o - W, end);
                }
            }
        }
    }

    const Resample2dArgs& args_;
    const Phases<A> f_;
    std::vector<A> memory_;
    std::int64_t pitch_;
    A* rows_[2]{};
    const A* from_[2][kMaxTaps];
};

}  // namespace gas
