// Host side of resample2d: rows of NCHW images.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "resample2d.h"
#include "resample2d_columns.h"
#include "resample2d_window.h"
#include "simd.h"

namespace gas {

// NCHW. The filtered row lies in a buffer between zeros; for step 2 its even and odd elements lie in two, so
// that every load along the row is contiguous.
template <class T, bool Stream>
class RowFilter {
    using A = Acc<T>;
    static constexpr int W = kLanes<T>;
    using V = Vec<A, W>;
    using Lanes = std::make_integer_sequence<int, W>;

  public:
    static constexpr std::int64_t kBatch = 8;

    explicit RowFilter(const Resample2dArgs& args)
        : args_(args), f_(phases_of<A>(args)), window_(window_of(f_)) {
        if (window_ > 0) return;
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
        const std::int64_t width = args_.out_width, begin = (plane * args_.out_height + o) * width;
        T* const y = static_cast<T*>(args_.y) + begin;
        if (window_ > 0) {
            return with_window(window_, [&]<class Win>(Win) {
                const WindowTaps<Win, A> taps(f_);
                for (std::int64_t r = 0, at = 0; r < rows; ++r, at += width) {
                    with_sum<Win>(Column<T>(args_, f_, plane, o + r), [&](const auto& sum) {
                        slide_row<T, Win, Stream>(args_, taps, sum, y + at, end - begin - at);
                    });
                }
            });
        }
        for (std::int64_t r = 0; r < rows; ++r) {
            const Column<T> column(args_, f_, plane, o + r);
            with_taps(column.count, [&](auto n) { down<n>(column, r * pitch_); });
        }
        const int taps = f_.phases == 1 || f_.count[0] == f_.count[1] ? f_.count[0] : 0;
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
                    store_before<T, Stream>(y, o, sum(0, shift + o), width - o, end);
            } else {
                for (std::int64_t o = 0; o < width; o += 2 * W) {
                    const auto [low, high] =
                        interleave(sum(0, shift + o / 2), sum(1, shift + o / 2), Lanes{});
                    store_before<T, Stream>(y, o, low, width - o, end);
                    if (o + W < width) store_before<T, Stream>(y, o + W, high, width - o - W, end);
                }
            }
        }
    }

    const Resample2dArgs& args_;
    const Phases<A> f_;
    const int window_;
    std::vector<A> memory_;
    std::int64_t pitch_ = 0;
    A* rows_[2]{};
    const A* from_[2][kMaxTaps];
};

}  // namespace gas
