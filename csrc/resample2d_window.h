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

// Call body with the window and the number of rows that meet (0: as the column says, near the border).
template <class Body>
GAS_HD void with_window(int window, int rows, Body&& body) {
    const auto call = [&](auto w) {
        constexpr int M = decltype(w)::M;
        rows == M ? body(w, std::integral_constant<int, M>{}) : body(w, std::integral_constant<int, 0>{});
    };
    switch (window) {
        case 1:
            return call(Down4{});
        case 2:
            return call(Down2{});
        case 3:
            return call(Up4{});
        default:
            return call(Up2{});
    }
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
template <class T, class Win, int N, int U, bool Full>
void slide_pixels(const Resample2dArgs& args, const WindowTaps<Win, Acc<T>>& taps, const ColumnSum<T, N>& sum,
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
                store_lanes<Full, T, V, W>(y + o * inner + c + u * W, taps.sum(window[u], s), left);
        }
    }
}

template <class T, class Win, int N>
void slide_pixels(const Resample2dArgs& args, const WindowTaps<Win, Acc<T>>& taps, const ColumnSum<T, N>& sum,
                  T* y) {
    constexpr int W = kLanes<T>, U = 4;
    const std::int64_t inner = args.inner;
    std::int64_t c = 0;
    for (; c + U * W <= inner; c += U * W) slide_pixels<T, Win, N, U, true>(args, taps, sum, c, W, y);
    for (; c + W <= inner; c += W) slide_pixels<T, Win, N, 1, true>(args, taps, sum, c, W, y);
    if (c < inner) slide_pixels<T, Win, N, 1, false>(args, taps, sum, c, inner - c, y);
}

// Lanes D further on in a row of which three neighbouring vectors are given.
template <int D, class V, int... I>
GAS_HD V shifted(V before, V here, V after, std::integer_sequence<int, I...>) {
    static_assert(D >= -1 && D <= 1);
    if constexpr (D < 0)
        return __builtin_shufflevector(before, here, static_cast<int>(sizeof...(I)) - 1 + I...);
    if constexpr (D > 0) return __builtin_shufflevector(here, after, 1 + I...);
    return here;
}

// One row of y of NCHW, W outputs of each phase at a time. `end`: elements from y on that may be overwritten.
template <class T, class Win, int N>
void slide_row(const Resample2dArgs& args, const WindowTaps<Win, Acc<T>>& taps, const ColumnSum<T, N>& sum,
               T* y, std::int64_t end) {
    constexpr int W = kLanes<T>, S = Win::Step;
    using V = Vec<Acc<T>, W>;
    using Lanes = std::make_integer_sequence<int, W>;
    const std::int64_t width = args.width, out_width = args.out_width;
    const auto columns = [&](std::int64_t w) {
        if (w >= width) return V{};
        const V v = sum(w, width - w);
        return w + W <= width ? v : first_lanes(v, width - w);
    };
    struct Piece {
        V part[S];  // for step 2 the even and the odd columns
    };
    const auto piece = [&](std::int64_t w) {
        Piece p;
        p.part[0] = columns(w);
        if constexpr (S == 2)
            std::tie(p.part[0], p.part[1]) = deinterleave(p.part[0], columns(w + W), Lanes{});
        return p;
    };
    Piece before{}, here = piece(0);
    std::int64_t w = 0;
    for (std::int64_t o = 0; o < out_width; o += Win::Phases * W) {
        const Piece after = piece(w += S * W);
        V window[Win::L];
        [&]<int... I>(std::integer_sequence<int, I...>) {
            // Column d of the window is in part d mod S, shifted by d / S, rounded down.
            ((window[I] = shifted<((Win::First + I + S) / S - 1)>(
                  before.part[(Win::First + I + S) % S], here.part[(Win::First + I + S) % S],
                  after.part[(Win::First + I + S) % S], Lanes{})),
             ...);
        }(std::make_integer_sequence<int, Win::L>{});
        const V first = taps.sum(window, 0);
        if constexpr (Win::Phases == 1) {
            store_before<T>(y, o, first, out_width - o, end);
        } else {
            const auto [low, high] = interleave(first, taps.sum(window, 1), Lanes{});
            store_before<T>(y, o, low, out_width - o, end);
            if (o + W < out_width) store_before<T>(y, o + W, high, out_width - o - W, end);
        }
        before = here;
        here = after;
    }
}

}  // namespace gas
