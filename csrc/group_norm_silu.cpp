#include "group_norm_silu.h"

#include "group_norm_silu_host.h"

namespace gas {
namespace {

// The sums of d and d^2, d = x - pivot, over n contiguous elements.
template <class T>
void moments(const T* x, std::int64_t n, Acc<T> pivot, double& sum, double& squares) {
    constexpr int W = kLanes<T>;
    using V = Vec<Acc<T>, W>;
    sum = squares = 0;
    for (std::int64_t start = 0; start < n; start += kRun) {
        const std::int64_t end = std::min(start + kRun, n);
        V first[kTile]{}, second[kTile]{};
        const auto add = [&](int u, V d) {
            first[u] += d;
            second[u] += d * d;
        };
        std::int64_t at = start;
        for (; at + kTile * W <= end; at += kTile * W) {
            for (int u = 0; u < kTile; ++u) add(u, load<true>(x + at + u * W, W) - pivot);
        }
        for (; at + W <= end; at += W) add(0, load<true>(x + at, W) - pivot);
        if (at < end) {
            V d = load<false>(x + at, end - at) - pivot;
            for (std::int64_t k = end - at; k < W; ++k) d[k] = 0;
            add(0, d);
        }
        sum += lane_sum((first[0] + first[1]) + (first[2] + first[3]));
        squares += lane_sum((second[0] + second[1]) + (second[2] + second[3]));
    }
}

// Mean and variance in one pass around the first element; where that lies more than two standard deviations
// off, so that the squares would cancel, in a second one around the mean.
template <class T>
void statistics(const T* x, std::int64_t n, Acc<T>& mean, double& variance) {
    using A = Acc<T>;
    const A pivot = load<false>(x, 1)[0];
    double sum, squares;
    moments(x, n, pivot, sum, squares);
    const double offset = sum / n;
    mean = static_cast<A>(static_cast<double>(pivot) + offset);
    variance = squares / n - offset * offset;
    if (offset * offset <= 4 * variance) return;
    moments(x, n, mean, sum, squares);
    variance = squares / n - (sum / n) * (sum / n);
}

template <class A>
void store_statistics(const GroupNormArgs& args, std::int64_t group, A mean, A rstd) {
    if (args.mean == nullptr) return;
    static_cast<A*>(args.mean)[group] = mean;
    static_cast<A*>(args.rstd)[group] = rstd;
}

// One group of [B, C, N]: contiguous, and in the cache after the first pass.
template <class T, bool Stream, class Choice>
void planar(Choice act, const GroupNormArgs& args, std::int64_t group) {
    using A = Acc<T>;
    constexpr int W = kLanes<T>;
    using V = Vec<A, W>;
    const std::int64_t N = args.N, channels = args.C / args.G, size = channels * N;
    const T* x = static_cast<const T*>(args.x) + group * size;
    const std::int64_t b = group / args.G, first = group % args.G * channels;
    T* out = static_cast<T*>(args.out) + b * args.out_stride + first * N;

    A mean;
    double variance;
    statistics(x, size, mean, variance);
    const A rstd = static_cast<A>(1 / std::sqrt(variance + args.eps));
    store_statistics(args, group, mean, rstd);

    for (std::int64_t c = 0; c < channels; ++c, x += N, out += N) {
        A gain, offset;
        folded(args, b, first + c, gain, offset);
        const Affine<V> affine{V{} + mean, V{} + rstd, V{} + gain, V{} + offset};
        const auto write = [&]<int U>(std::integral_constant<int, U>, auto full, std::int64_t at) {
            constexpr bool Full = decltype(full)::value;
            V y[U];
            for (int u = 0; u < U; ++u)
                y[u] = modulated(affine, centred(affine, load<Full>(x + at + u * W, N - at)));
            activate_all(act, y);
            for (int u = 0; u < U; ++u)
                store_lanes<Full, T, V, W, Full && Stream>(out + at + u * W, y[u], N - at);
        };
        std::int64_t at = 0;
        for (; at + kTile * W <= N; at += kTile * W)
            write(std::integral_constant<int, kTile>{}, std::true_type{}, at);
        for (; at + W <= N; at += W) write(std::integral_constant<int, 1>{}, std::true_type{}, at);
        if (at < N) write(std::integral_constant<int, 1>{}, std::false_type{}, at);
    }
    if constexpr (Stream) stream_fence();
}

// sums[c] = the sum over the pixels of term(x, vector of c).
template <class T, class Term>
void pixel_sums(const GroupNormArgs& args, const Block<T>& block, std::vector<double>& sums, Term&& term) {
    constexpr int W = kLanes<T>;
    using V = Vec<Acc<T>, W>;
    const T* x = static_cast<const T*>(args.x) + block.b * args.N * args.C;
    std::fill(sums.begin(), sums.end(), 0);
    block.tiles([&](auto full, std::int64_t c) {
        constexpr bool Full = decltype(full)::value;
        for (std::int64_t start = 0; start < args.N; start += kRun / W) {
            V part[kTile]{};
            for (std::int64_t n = start; n < std::min(start + kRun / W, args.N); ++n) {
                for (int u = 0; u < kTile; ++u)
                    part[u] += term(load<Full>(x + n * args.C + c + u * W, block.end - c - u * W), c + u * W);
            }
            for (int u = 0; u < kTile; ++u)
                for (int k = 0; k < W; ++k)
                    sums[c - block.first + u * W + k] += static_cast<double>(part[u][k]);
        }
    });
}

// Whole groups of one sample of [B, N, C]: vectors of channels, three passes over the pixels.
template <class T, class Choice>
void interleaved(Choice act, const GroupNormArgs& args, std::int64_t index) {
    using A = Acc<T>;
    constexpr int W = kLanes<T>;
    using V = Vec<A, W>;
    Block<T> block(args, index);
    const std::int64_t channels = args.C / args.G, size = channels * args.N;
    std::vector<double> sums(block.mean.size());
    // Calls body(its statistics' index, first of its channels in the block, its sum) for each group.
    const auto groups = [&](auto&& body) {
        for (std::int64_t c = 0; c < block.end - block.first; c += channels) {
            double sum = 0;
            for (std::int64_t k = c; k < c + channels; ++k) sum += sums[k];
            body(block.b * args.G + (block.first + c) / channels, c, sum / size);
        }
    };
    pixel_sums(args, block, sums, [](V v, std::int64_t) { return v; });
    groups([&](std::int64_t, std::int64_t c, double mean) {
        std::fill_n(block.mean.begin() + c, channels, static_cast<A>(mean));
    });
    pixel_sums(args, block, sums, [&](V v, std::int64_t c) {
        const V d = v - load<true>(&block.mean[c - block.first], W);
        return d * d;
    });
    groups([&](std::int64_t group, std::int64_t c, double variance) {
        const A rstd = static_cast<A>(1 / std::sqrt(variance + args.eps));
        std::fill_n(block.rstd.begin() + c, channels, rstd);
        store_statistics(args, group, block.mean[c], rstd);
    });

    const T* x = static_cast<const T*>(args.x) + block.b * args.N * args.C;
    T* out = static_cast<T*>(args.out) + block.b * args.N * args.C;
    block.tiles([&](auto full, std::int64_t c) {
        constexpr bool Full = decltype(full)::value;
        Affine<V> affine[kTile];
        for (int u = 0; u < kTile; ++u) affine[u] = block.affine(c + u * W);
        for (std::int64_t n = 0; n < args.N; ++n) {
            V y[kTile];
            const std::int64_t at = n * args.C + c, left = block.end - c;
            for (int u = 0; u < kTile; ++u)
                y[u] = modulated(affine[u], centred(affine[u], load<Full>(x + at + u * W, left - u * W)));
            activate_all(act, y);
            for (int u = 0; u < kTile; ++u) store_lanes<Full, T, V, W>(out + at + u * W, y[u], left - u * W);
        }
    });
}

}  // namespace

void group_norm_silu_cpu(const GroupNormArgs& args, int threads) {
    const std::int64_t elements = args.B * args.C * args.N;
    const bool parallel = threads > 1 && elements >= kGroupNormParallelFrom;
    const auto run = [&]<class T>(T, auto act) {
        const bool stream = streams(args.out, elements * bytes(args.dtype)) && args.N % kLanes<T> == 0;
        const std::int64_t tasks = args.channels_last ? Block<T>::count(args) : args.B * args.G;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
        for (std::int64_t task = 0; task < tasks; ++task) {
            if (args.channels_last)
                interleaved<T>(act, args, task);
            else
                stream ? planar<T, true>(act, args, task) : planar<T, false>(act, args, task);
        }
    };
    visit(args.dtype, [&](auto zero) { with_act(zero, args.act, [&](auto act) { run(zero, act); }); });
}

}  // namespace gas
