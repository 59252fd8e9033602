// Host side of resample2d for pixels of channels and the frequent filters: two or four taps, centred. Outputs
// come from a window of filtered columns that moves along the row in registers; nothing is stored on the way.
// Sums have the order of the general path, and so its bits.
#pragma once

#include <cstdint>
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

}  // namespace gas
