// Host side of resample2d for the frequent filters: two or four taps, centred. Outputs come from a window of
// filtered columns that moves along the row in registers; nothing is stored on the way. Sums have the order
// of the general path, and so its bits.
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "resample2d.h"
#include "resample2d_columns.h"
#include "simd.h"

namespace gas {

// `Step` columns of x give `Phases` of y, each of M taps of a window of L columns from column `First` on.
template <int Step_, int Phases_, int M_, int L_, int First_>
struct Window {
    static constexpr int Step = Step_, Phases = Phases_, M = M_, L = L_, First = First_;
    // The window's column that phase s begins with.
    static constexpr int offset(int s) { return s * (L - M); }

    template <class A>
    static bool fits(const gas::Phases<A>& f) {
        bool same = f.step == Step && f.phases == Phases;
        for (int s = 0; s < Phases; ++s) same = same && f.count[s] == M && f.first[s] == First + offset(s);
        return same;
    }
};

using Down4 = Window<2, 1, 4, 4, -1>;
using Down2 = Window<2, 1, 2, 2, 0>;
using Up4 = Window<1, 2, 2, 3, -1>;
using Up2 = Window<1, 2, 1, 1, 0>;

// Which of the windows serves a filter; 0 for none.
template <class A>
int window_of(const Phases<A>& f) {
    return Down4::fits(f) ? 1 : Down2::fits(f) ? 2 : Up4::fits(f) ? 3 : Up2::fits(f) ? 4 : 0;
}

template <class Body>
GAS_HD void with_window(int window, Body&& body) {
    switch (window) {
        case 1:
            return body(Down4{});
        case 2:
            return body(Down2{});
        case 3:
            return body(Up4{});
        default:
            return body(Up2{});
    }
}

// Call body with the sum down a column: of as many rows as the window has taps, or, near the border, of
// fewer.
template <class Win, class T, class Body>
GAS_HD void with_sum(const Column<T>& column, Body&& body) {
    column.count == Win::M ? body(ColumnSum<T, Win::M>(column)) : body(ColumnSum<T, 0>(column));
}

template <class Win, class A>
struct WindowTaps {
    A at[Win::Phases][Win::M];

    explicit WindowTaps(const Phases<A>& f) {
        for (int s = 0; s < Win::Phases; ++s)
            for (int j = 0; j < Win::M; ++j) at[s][j] = f.taps[s][j];
    }

    // Phase s of a window of vectors.
    template <class V>
    GAS_HD V sum(const V (&window)[Win::L], int s) const {
        V total{};
#pragma GCC unroll 4
        for (int j = 0; j < Win::M; ++j) total += at[s][j] * window[Win::offset(s) + j];
        return total;
    }
};

// One row of y of channels_last: U vectors of channels from c on, of which `left` count.
template <class T, class Win, int U, bool Full, bool Stream, class Sum>
void slide_pixels(const Resample2dArgs& args, const WindowTaps<Win, Acc<T>>& taps, const Sum& sum,
                  std::int64_t c, std::int64_t left, T* y) {
    constexpr int W = kLanes<T>, L = Win::L, S = Win::Step;
    using V = Vec<Acc<T>, W>;
    const std::int64_t width = args.width, inner = args.inner, out_width = args.out_width;
    V window[U][L];
    const auto fill = [&](int i, std::int64_t column) {
        const bool inside = column >= 0 && column < width;
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
            window[u][i] = inside ? sum(column * inner + c + u * W, Full ? W : left) : V{};
    };
#pragma GCC unroll 4
    for (int i = S; i < L; ++i) fill(i, Win::First + i - S);
    std::int64_t o = 0;
    for (std::int64_t column = Win::First; o < out_width; column += S) {
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
            for (int i = 0; i + S < L; ++i) window[u][i] = window[u][i + S];
        }
#pragma GCC unroll 4
        for (int i = L - S; i < L; ++i) fill(i, column + i);
#pragma GCC unroll 2
        for (int s = 0; s < Win::Phases; ++s, ++o) {
            if (s > 0 && o == out_width) break;
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u)
                store_lanes<Full, T, V, W, Stream>(y + o * inner + c + u * W, taps.sum(window[u], s), left);
        }
    }
}

template <class T, class Win, bool Stream, class Sum>
void slide_pixels(const Resample2dArgs& args, const WindowTaps<Win, Acc<T>>& taps, const Sum& sum, T* y) {
    constexpr int W = kLanes<T>, U = 4;
    const std::int64_t inner = args.inner;
    std::int64_t c = 0;
    for (; c + U * W <= inner; c += U * W) slide_pixels<T, Win, U, true, Stream>(args, taps, sum, c, W, y);
    for (; c + W <= inner; c += W) slide_pixels<T, Win, 1, true, Stream>(args, taps, sum, c, W, y);
    if (c < inner) slide_pixels<T, Win, 1, false, Stream>(args, taps, sum, c, inner - c, y);
}

// One row of y of NCHW, in vectors of columns; `end` as in store_before.
template <class T, class Win, bool Stream, class Sum>
void slide_row(const Resample2dArgs& args, const WindowTaps<Win, Acc<T>>& taps, const Sum& sum, T* y,
               std::int64_t end) {
    constexpr int W = kLanes<T>, S = Win::Step;
    using V = Vec<Acc<T>, W>;
    const std::make_integer_sequence<int, W> lanes;
    const std::int64_t width = args.width, out_width = args.out_width;
    struct Block {
        V at[S];  // columns, or the even ones and the odd ones
    };
    const auto block = [&](std::int64_t column) {
        Block v{};  // beyond the image there are zeros
#pragma GCC unroll 2
        for (int i = 0; i < S; ++i, column += W) {
            if (column < width) v.at[i] = sum(column, width - column);
            if (column < width && column + W > width) v.at[i] = first_lanes(v.at[i], width - column);
        }
        if constexpr (S == 2) std::tie(v.at[0], v.at[1]) = deinterleave(v.at[0], v.at[1], lanes);
        return v;
    };
    Block before{}, here = block(0);
    for (std::int64_t o = 0, column = S * W; o < out_width; o += Win::Phases * W, column += S * W) {
        const Block after = block(column);
        V window[Win::L];
#pragma GCC unroll 4
        for (int i = 0; i < Win::L; ++i) {
            const int k = Win::First + i;
            window[i] = k < 0    ? across<W - 1>(before.at[S - 1], here.at[S - 1], lanes)
                        : k >= S ? across<1>(here.at[0], after.at[0], lanes)
                                 : here.at[k];
        }
        V low = taps.sum(window, 0), high{};
        if constexpr (Win::Phases == 2) std::tie(low, high) = interleave(low, taps.sum(window, 1), lanes);
        store_before<T, Stream>(y, o, low, out_width - o, end);
        if (Win::Phases == 2 && o + W < out_width)
            store_before<T, Stream>(y, o + W, high, out_width - o - W, end);
        before = here, here = after;
    }
}

}  // namespace gas
