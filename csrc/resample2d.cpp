#include "resample2d.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "simd.h"

namespace gas {
namespace {

constexpr std::int64_t kTask = 16384;          // outputs a thread takes at a time, in whole rows
constexpr std::int64_t kParallelFrom = 16384;  // outputs below which waking the threads costs more
constexpr std::int64_t kCache = 24576;         // bytes of filtered rows that stay in the first-level cache

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

// The rows of x that one row of y is made of, clipped to the image.
template <class T>
struct Column {
    const T* rows[kMaxTaps];
    Acc<T> taps[kMaxTaps];
    int count = 0;
    std::int64_t readable = 0;  // elements from rows[...] on that lie in the tensor, for each of them

    Column(const Resample2dArgs& args, const Phases<Acc<T>>& f, std::int64_t row) {
        const std::int64_t plane = row / args.out_height, o = row % args.out_height,
                           length = args.width * args.inner;
        const int s = static_cast<int>(o % f.phases);
        const std::int64_t first = o / f.phases * f.step + f.first[s];
        for (int j = 0; j < f.count[s]; ++j) {
            if (first + j < 0 || first + j >= args.height) continue;
            const std::int64_t at = (plane * args.height + first + j) * length;
            rows[count] = static_cast<const T*>(args.x) + at;
            taps[count++] = f.taps[s][j];
            readable = args.planes * args.height * length - at;
        }
    }

    // One vector of the filtered row, `count` is what remains of the row.
    Vec<Acc<T>, kLanes<T>> sum(std::int64_t at, std::int64_t left) const {
        Vec<Acc<T>, kLanes<T>> total{};
        if (at + kLanes<T> <= readable) {  // over the end of the row rather than in parts
            for (int j = 0; j < count; ++j) total += taps[j] * load<true>(rows[j] + at, left);
        } else {
            for (int j = 0; j < count; ++j) total += taps[j] * load<false>(rows[j] + at, left);
        }
        return total;
    }
};

template <class T>
void store_within(T* y, std::int64_t at, Vec<Acc<T>, kLanes<T>> v, std::int64_t left, std::int64_t end) {
    // Over the end of the row where this thread goes on to write what follows.
    if (at + kLanes<T> <= end)
        store_lanes<true, T, Vec<Acc<T>, kLanes<T>>, kLanes<T>>(y + at, v, left);
    else
        store_lanes<false, T, Vec<Acc<T>, kLanes<T>>, kLanes<T>>(y + at, v, left);
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
    explicit RowFilter(const Resample2dArgs& args) : args_(args), f_(phases_of<A>(args)) {
        const std::int64_t steps = (args.out_width + f_.phases - 1) / f_.phases;
        std::int64_t reach = 0;
        for (int s = 0; s < f_.phases; ++s)
            reach = std::max(reach, (steps - 1) * f_.step + f_.first[s] + f_.count[s]);
        const std::int64_t most = std::max(reach, args.width) / f_.step + 1;
        length_ = most + 2 * W;
        memory_.assign(f_.step * (kMaxTaps + length_ + W), A{});
        for (int k = 0; k < f_.step; ++k) rows_[k] = memory_.data() + k * (kMaxTaps + length_ + W) + kMaxTaps;
        for (int s = 0; s < f_.phases; ++s) {
            for (int j = 0; j < f_.count[s]; ++j) {
                const int at = f_.first[s] + j + f_.step * kMaxTaps;  // positive, so that / rounds down
                from_[s][j] = rows_[at % f_.step] + at / f_.step - kMaxTaps;
            }
        }
    }

    void operator()(std::int64_t row, std::int64_t end) {
        const Column<T> column(args_, f_, row);
        const std::int64_t width = args_.width;
        if (f_.step == 1) {
            for (std::int64_t w = 0; w < width; w += W) put_row(0, w, column.sum(w, width - w));
            clear(0, width);
        } else {
            for (std::int64_t w = 0; w < width; w += 2 * W) {
                const auto [even, odd] =
                    deinterleave(column.sum(w, width - w), column.sum(w + W, width - w - W), Lanes{});
                put_row(0, w / 2, even);
                put_row(1, w / 2, odd);
            }
            clear(0, (width + 1) / 2);
            clear(1, width / 2);
        }
        T* const y = static_cast<T*>(args_.y);
        const std::int64_t begin = row * args_.out_width, out_width = args_.out_width;
        if (f_.phases == 1) {
            for (std::int64_t o = 0; o < out_width; o += W)
                store_within<T>(y, begin + o, along(0, o), out_width - o, end);
        } else {
            for (std::int64_t o = 0; o < out_width; o += 2 * W) {
                const auto [low, high] = interleave(along(0, o / 2), along(1, o / 2), Lanes{});
                store_within<T>(y, begin + o, low, out_width - o, end);
                if (o + W < out_width) store_within<T>(y, begin + o + W, high, out_width - o - W, end);
            }
        }
    }

  private:
    void put_row(int k, std::int64_t at, V v) { std::memcpy(rows_[k] + at, &v, sizeof v); }

    void clear(int k, std::int64_t from) { std::fill(rows_[k] + from, rows_[k] + length_ - W, A{}); }

    V along(int s, std::int64_t at) const {
        V total{};
        for (int j = 0; j < f_.count[s]; ++j) total += f_.taps[s][j] * load<true>(from_[s][j] + at, W);
        return total;
    }

    const Resample2dArgs& args_;
    const Phases<A> f_;
    std::vector<A> memory_;
    A* rows_[2];
    const A* from_[2][kMaxTaps];
    std::int64_t length_;
};

// channels_last. The filtered row is kept for as many channels as the cache holds; both passes are vectors of
// channels.
template <class T>
class PixelFilter {
    using A = Acc<T>;
    static constexpr int W = kLanes<T>;
    using V = Vec<A, W>;

  public:
    explicit PixelFilter(const Resample2dArgs& args) : args_(args), f_(phases_of<A>(args)) {
        const std::int64_t padded = (args.inner + W - 1) / W * W;
        const std::int64_t fits =
            kCache / static_cast<std::int64_t>(sizeof(A)) / std::max<std::int64_t>(args.width, 1);
        block_ = std::clamp<std::int64_t>(fits / W * W, 4 * W, std::max<std::int64_t>(padded, 4 * W));
        memory_.assign(args.width * std::min(block_, padded), A{});
        stride_ = std::min(block_, padded);
    }

    void operator()(std::int64_t row, std::int64_t end) {
        const Column<T> column(args_, f_, row);
        T* const y = static_cast<T*>(args_.y) + row * args_.out_width * args_.inner;
        end -= row * args_.out_width * args_.inner;
        for (std::int64_t c = 0; c < args_.inner; c += block_) {
            const std::int64_t channels = std::min(block_, args_.inner - c);
            // With one block alone, what is stored over the end of a pixel is overwritten by the next one.
            if (block_ < args_.inner) end = 0;
            for (std::int64_t w = 0; w < args_.width; ++w) {
                A* const filtered = memory_.data() + w * stride_;
                for (std::int64_t k = 0; k < channels; k += W) {
                    const V v = column.sum(w * args_.inner + c + k, channels - k);
                    std::memcpy(filtered + k, &v, sizeof v);
                }
            }
            for (std::int64_t o = 0; o < args_.out_width; ++o) {
                const int s = static_cast<int>(o % f_.phases);
                const std::int64_t left = o / f_.phases * f_.step + f_.first[s];
                const std::int64_t from = std::max<std::int64_t>(0, -left);
                const std::int64_t to = std::min<std::int64_t>(f_.count[s], args_.width - left);
                for (std::int64_t k = 0; k < channels; k += W) {
                    V total{};
                    for (std::int64_t j = from; j < to; ++j)
                        total += f_.taps[s][j] * load<true>(memory_.data() + (left + j) * stride_ + k, W);
                    const std::int64_t at = o * args_.inner + c + k;
                    store_within<T>(y, at, total, channels - k, channels - k >= W ? at + W : end);
                }
            }
        }
    }

  private:
    const Resample2dArgs& args_;
    const Phases<A> f_;
    std::int64_t block_, stride_;
    std::vector<A> memory_;
};

template <class Filter>
void run(const Resample2dArgs& args, int threads) {
    const std::int64_t length = args.out_width * args.inner, rows = args.planes * args.out_height;
    const std::int64_t step = std::max<std::int64_t>(1, kTask / length), tasks = (rows + step - 1) / step;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * length >= kParallelFrom)
    {
        Filter filter(args);
#pragma omp for schedule(static)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t end = std::min((task + 1) * step, rows);
            for (std::int64_t row = task * step; row < end; ++row) filter(row, end * length);
        }
    }
}

}  // namespace

void resample2d_cpu(const Resample2dArgs& args, int threads) {
    if (args.planes * args.out_height * args.out_width * args.inner == 0) return;
    visit(args.dtype, [&]<class T>(T) {
        args.inner == 1 ? run<RowFilter<T>>(args, threads) : run<PixelFilter<T>>(args, threads);
    });
}

}  // namespace gas
