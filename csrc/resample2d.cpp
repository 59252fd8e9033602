#include "resample2d.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "resample2d_columns.h"
#include "resample2d_rows.h"
#include "resample2d_window.h"
#include "simd.h"

namespace gas {
namespace {

constexpr std::int64_t kTask = 16384;          // outputs a thread takes at a time, in whole rows or planes
constexpr std::int64_t kParallelFrom = 16384;  // outputs below which waking the threads costs more
constexpr std::int64_t kCache = 131072;        // bytes of filtered rows that stay in a core's own cache
constexpr std::int64_t kLongRow = 32768;       // bytes of a row that a moving window is not for
constexpr std::int64_t kSmall = 256;           // pixels of planes that are transposed

// channels_last. The filtered row is kept for as many channels as the cache holds; both passes are vectors of
// channels.
template <class T, bool Stream>
class PixelFilter {
    using A = Acc<T>;
    static constexpr int W = kLanes<T>;
    using V = Vec<A, W>;

  public:
    static constexpr std::int64_t kBatch = 1;

    explicit PixelFilter(const Resample2dArgs& args)
        : args_(args), f_(phases_of<A>(args)), window_(window_of(f_)) {
        // Long rows are read faster from end to end.
        const std::int64_t bytes = args.width * args.inner * static_cast<std::int64_t>(sizeof(T));
        if (f_.step == 2 && f_.count[0] > 2 && bytes > kLongRow) window_ = 0;
        if (window_ > 0) return;
        const std::int64_t padded = (args.inner + W - 1) / W * W;
        const std::int64_t fits = kCache / static_cast<std::int64_t>(sizeof(A)) / args.width / W * W;
        stride_ = std::clamp<std::int64_t>(fits, std::min<std::int64_t>(4 * W, padded), padded);
        memory_.resize(args.width * stride_);
        const auto meets_border = [&](std::int64_t w) {
            return left(w) < 0 || left(w) + f_.count[w & (f_.phases - 1)] > args.width;
        };
        while (inside_ < args.out_width && meets_border(inside_)) ++inside_;
        outside_ = args.out_width;
        while (outside_ > inside_ && meets_border(outside_ - 1)) --outside_;
    }

    void operator()(std::int64_t plane, std::int64_t o, std::int64_t, std::int64_t end) {
        const Column<T> column(args_, f_, plane, o);
        const std::int64_t begin = (plane * args_.out_height + o) * args_.out_width * args_.inner;
        T* const y = static_cast<T*>(args_.y) + begin;
        if (window_ > 0) {
            return with_window(window_, [&]<class Win>(Win) {
                const WindowTaps<Win, A> taps(f_);
                with_sum<Win>(column,
                              [&](const auto& sum) { slide_pixels<T, Win, Stream>(args_, taps, sum, y); });
            });
        }
        // With one block alone, in one phase, what is stored over the end of a pixel is overwritten by the
        // next.
        const T* const last = stride_ < args_.inner || f_.phases > 1 ? y : y + (end - begin);
        for (std::int64_t c = 0; c < args_.inner; c += stride_) {
            const std::int64_t channels = std::min(stride_, args_.inner - c);
            with_taps(column.count, [&](auto n) { down<n>(column, c, channels); });
            for (std::int64_t w = 0; w < inside_; ++w) clipped(w, y + c, channels, last);
            for (int k = 0; k < f_.phases; ++k) {
                const int s = static_cast<int>((inside_ + k) & (f_.phases - 1));
                with_taps(f_.count[s], [&](auto n) { along<n>(inside_ + k, s, y + c, channels, last); });
            }
            for (std::int64_t w = outside_; w < args_.out_width; ++w) clipped(w, y + c, channels, last);
        }
    }

  private:
    template <int N>
    void down(const Column<T>& column, std::int64_t c, std::int64_t channels) {
        const ColumnSum<T, N> sum(column);
        // All channels at once, and whole vectors of them: the row is one run of memory.
        const bool one_run = stride_ == args_.inner;
        const std::int64_t pixels = one_run ? 1 : args_.width,
                           length = one_run ? args_.width * stride_ : channels;
        const std::int64_t inner = args_.inner, stride = stride_;
        A* const memory = memory_.data();
        for (std::int64_t w = 0; w < pixels; ++w) {
            for (std::int64_t k = 0; k < length; k += W) {
                const V v = sum(w * inner + c + k, length - k);
                std::memcpy(memory + w * stride + k, &v, sizeof v);
            }
        }
    }

    // The first pixel of x under column w of y.
    std::int64_t left(std::int64_t w) const {
        const int mask = f_.phases - 1;
        return (w >> mask) * f_.step + f_.first[w & mask];
    }

    // Column w of y, near the border: only taps that meet the image.
    void clipped(std::int64_t w, T* y, std::int64_t channels, const T* last) const {
        const int s = static_cast<int>(w & (f_.phases - 1));
        const int from = static_cast<int>(std::max<std::int64_t>(0, -left(w)));
        const int to = static_cast<int>(std::min<std::int64_t>(f_.count[s], args_.width - left(w)));
        pixel<0>(f_.taps[s] + from, to - from, memory_.data() + (left(w) + from) * stride_, stride_,
                 y + w * args_.inner, channels, last);
    }

    // Columns of phase s, from `first` on.
    template <int N>
    void along(std::int64_t first, int s, T* y, std::int64_t channels, const T* last) const {
        A taps[N > 0 ? N : kMaxTaps];
        const int count = N > 0 ? N : f_.count[s];
#pragma GCC unroll 4
        for (int j = 0; j < count; ++j) taps[j] = f_.taps[s][j];
        const std::int64_t stride = stride_, pitch = f_.phases * args_.inner, step = f_.step * stride;
        const A* row = memory_.data() + left(first) * stride;
        T* at = y + first * args_.inner;
        for (std::int64_t more = outside_ - first; more > 0; more -= f_.phases, row += step, at += pitch)
            pixel<N>(taps, count, row, stride, at, channels, last);
    }

    template <int N>
    GAS_HD static void pixel(const A* taps, int count, const A* row, std::int64_t stride, T* y,
                             std::int64_t channels, const T* last) {
        const int n = N > 0 ? N : count;
        for (std::int64_t k = 0; k < channels; k += W) {
            V total{};
#pragma GCC unroll 4
            for (int j = 0; j < n; ++j) total += taps[j] * load<true>(row + j * stride + k, W);
            store_before<T, Stream>(y, k, total, channels - k, channels - k >= W ? k + W : last - y);
        }
    }

    const Resample2dArgs& args_;
    const Phases<A> f_;
    int window_;
    std::int64_t stride_ = 0, inside_ = 0, outside_ = 0;  // columns from inside_ to outside_ meet no border
    std::vector<A> memory_;
};

// NCHW with small planes, whose rows would leave most lanes empty: as many planes as there are lanes are
// transposed to pixels of planes, filtered, and transposed back.
template <class T>
class SmallFilter {
    using A = Acc<T>;
    static constexpr int W = kLanes<T>;
    using V = Vec<A, W>;

  public:
    explicit SmallFilter(const Resample2dArgs& args)
        : args_(args), in_(args.height * args.width), out_(args.out_height * args.out_width) {
        x_.resize((in_ + W) * W);
        y_.resize((out_ + W) * W);
        pixels_ = args;
        pixels_.dtype = args.dtype == DType::f64 ? DType::f64 : DType::f32;
        pixels_.x = x_.data();
        pixels_.y = y_.data();
        pixels_.planes = 1;
        pixels_.inner = W;
        filter_ = std::make_unique<PixelFilter<A, false>>(pixels_);
    }

    void operator()(std::int64_t first) {
        const std::int64_t planes = std::min<std::int64_t>(W, args_.planes - first), in = in_, out = out_;
        const T* const x = static_cast<const T*>(args_.x) + first * in;
        const std::int64_t readable = (args_.planes - first) * in;
        A *const pixels = x_.data(), *const filtered = y_.data();
        for (std::int64_t p = 0; p < in; p += W) {
            V v[W]{};
            for (int i = 0; i < planes; ++i) {
                const std::int64_t at = i * in + p;
                v[i] = at + W <= readable ? load<true>(x + at, W) : load<false>(x + at, in - p);
            }
            transpose(v);
#pragma GCC unroll 16
            for (int k = 0; k < W; ++k) std::memcpy(pixels + (p + k) * W, &v[k], sizeof v[k]);
        }
        for (std::int64_t o = 0; o < args_.out_height; ++o) (*filter_)(0, o, 1, out* W);
        T* const y = static_cast<T*>(args_.y) + first * out;
        for (std::int64_t p = 0; p < out; p += W) {
            V v[W];
#pragma GCC unroll 16
            for (int k = 0; k < W; ++k) v[k] = load<true>(filtered + (p + k) * W, W);
            transpose(v);
            for (int i = 0; i < planes; ++i)
                store_before<T>(y, i * out + p, v[i], out - p, p + W <= out ? i * out + p + W : 0);
        }
    }

  private:
    const Resample2dArgs& args_;
    const std::int64_t in_, out_;
    std::vector<A> x_, y_;
    Resample2dArgs pixels_;
    std::unique_ptr<PixelFilter<A, false>> filter_;
};

template <class Filter>
void filter_rows(const Resample2dArgs& args, int threads) {
    const std::int64_t length = args.out_width * args.inner, rows = args.planes * args.out_height;
    const std::int64_t step = std::max<std::int64_t>(1, kTask / length), tasks = (rows + step - 1) / step;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * length >= kParallelFrom)
    {
        Filter filter(args);
#pragma omp for schedule(static)
        for (std::int64_t task = 0; task < tasks; ++task) {
            const std::int64_t first = task * step, last = std::min(first + step, rows);
            std::int64_t plane = first / args.out_height, o = first % args.out_height;
            for (std::int64_t row = first, batch; row < last; row += batch) {
                batch = std::min({Filter::kBatch, last - row, args.out_height - o});
                filter(plane, o, batch, last * length);
                o += batch;
                if (o == args.out_height) ++plane, o = 0;
            }
            stream_fence();
        }
    }
}

template <class T>
void filter_planes(const Resample2dArgs& args, int threads) {
    const std::int64_t groups = (args.planes + kLanes<T> - 1) / kLanes<T>;
    const std::int64_t outputs = args.planes * args.out_height * args.out_width;
#pragma omp parallel num_threads(threads) if (threads > 1 && outputs >= kParallelFrom)
    {
        SmallFilter<T> filter(args);
#pragma omp for schedule(static)
        for (std::int64_t group = 0; group < groups; ++group) filter(group * kLanes<T>);
    }
}

}  // namespace

void resample2d_cpu(const Resample2dArgs& args, int threads) {
    const std::int64_t outputs = args.planes * args.out_height * args.out_width * args.inner;
    if (outputs == 0) return;
    visit(args.dtype, [&]<class T>(T) {
        const std::int64_t pixels = std::max(args.height * args.width, args.out_height * args.out_width);
        const std::int64_t run = args.inner > 1 ? args.inner : args.out_width;
        const bool stream = run % kLanes<T> == 0 && streams(args.y, outputs * bytes(args.dtype));
        if (args.inner > 1)
            stream ? filter_rows<PixelFilter<T, true>>(args, threads)
                   : filter_rows<PixelFilter<T, false>>(args, threads);
        else if (pixels <= kSmall && args.planes >= kLanes<T>)
            filter_planes<T>(args, threads);
        else
            stream ? filter_rows<RowFilter<T, true>>(args, threads)
                   : filter_rows<RowFilter<T, false>>(args, threads);
    });
}

}  // namespace gas
