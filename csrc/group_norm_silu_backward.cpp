#include "group_norm_silu.h"
#include "group_norm_silu_host.h"

namespace gas {
namespace {

// dy of a group is kept between the two passes where it fits here: cheaper than a second exponential. The
// numbers are the same either way.
constexpr std::int64_t kKeptBytes = 128 << 10;

// One group of [B, C, N].
template <class T, bool Stream>
void planar(const GroupNormArgs& args, std::int64_t group, bool kept, Acc<T>* dys) {
    using A = Acc<T>;
    constexpr int W = kLanes<T>;
    using V = Vec<A, W>;
    const std::int64_t N = args.N, channels = args.C / args.G, size = channels * N;
    const std::int64_t b = group / args.G, first = group % args.G * channels;
    const T* const x = static_cast<const T*>(args.x) + group * size;
    const T* const g = static_cast<const T*>(args.g) + group * size;
    const A mean = static_cast<const A*>(args.mean)[group], rstd = static_cast<const A*>(args.rstd)[group];
    const auto affine_of = [&](std::int64_t c) {
        A gain, offset;
        folded(args, b, first + c, gain, offset);
        return Affine<V>{V{} + mean, V{} + rstd, V{} + gain, V{} + offset};
    };

    double sum1 = 0, sum2 = 0;
    for (std::int64_t c = 0; c < channels; ++c) {
        const Affine<V> affine = affine_of(c);
        double s1 = 0, s2 = 0;
        for (std::int64_t start = c * N; start < (c + 1) * N; start += kRun) {
            const std::int64_t end = std::min(start + kRun, (c + 1) * N);
            V part1[2]{}, part2[2]{};
            const auto take = [&](auto full, std::int64_t at, int u) {
                constexpr bool Full = decltype(full)::value;
                V n, dy;  // past the end g is zero, so dy is (its slope is finite: n comes from x = 0)
                norm_act_slope(args.act, affine, load<Full>(x + at, end - at), load<Full>(g + at, end - at),
                               n, dy);
                part1[u] += dy;
                part2[u] += dy * n;
                if (kept) store_lanes<Full, A, V, W>(dys + at, dy, end - at);
            };
            std::int64_t at = start;
            for (; at + 2 * W <= end; at += 2 * W)
                take(std::true_type{}, at, 0), take(std::true_type{}, at + W, 1);
            for (; at + W <= end; at += W) take(std::true_type{}, at, 0);
            if (at < end) take(std::false_type{}, at, 0);
            s1 += lane_sum(part1[0] + part1[1]), s2 += lane_sum(part2[0] + part2[1]);
        }
        store_channel_sums<A>(args, b, first + c, s1, s2);
        sum1 += s1 * static_cast<double>(affine.gain[0]), sum2 += s2 * static_cast<double>(affine.gain[0]);
    }
    if (args.out == nullptr) return;

    const V m1 = V{} + static_cast<A>(sum1 / size), m2 = V{} + static_cast<A>(sum2 / size);
    T* const dx = static_cast<T*>(args.out) + group * size;
    for (std::int64_t c = 0; c < channels; ++c) {
        const Affine<V> affine = affine_of(c);
        const std::int64_t end = (c + 1) * N;
        const auto write = [&](auto full, std::int64_t at) {
            constexpr bool Full = decltype(full)::value;
            V n, dy;
            __builtin_prefetch(x + at + size);  // of the group that this thread most likely takes next
            __builtin_prefetch(g + at + size);
            if (kept) {
                n = normalised(affine, load<Full>(x + at, end - at));
                dy = load<Full>(dys + at, end - at);
            } else {
                norm_act_slope(args.act, affine, load<Full>(x + at, end - at), load<Full>(g + at, end - at),
                               n, dy);
            }
            store_lanes<Full, T, V, W, Full && Stream>(dx + at, norm_dx(affine, n, dy, m1, m2), end - at);
        };
        std::int64_t at = c * N;
        for (; at + W <= end; at += W) write(std::true_type{}, at);
        if (at < end) write(std::false_type{}, at);
    }
    if constexpr (Stream) stream_fence();
}

// Whole groups of one sample of [B, N, C].
template <class T>
void interleaved(const GroupNormArgs& args, std::int64_t index) {
    using A = Acc<T>;
    constexpr int W = kLanes<T>;
    using V = Vec<A, W>;
    Block<T> block(args, index);
    const std::int64_t channels = args.C / args.G, size = channels * args.N,
                       offset = block.b * args.N * args.C;
    const T* const x = static_cast<const T*>(args.x) + offset;
    const T* const g = static_cast<const T*>(args.g) + offset;
    for (std::int64_t c = block.first; c < block.end; ++c) {
        const std::int64_t group = block.b * args.G + c / channels;
        block.mean[c - block.first] = static_cast<const A*>(args.mean)[group];
        block.rstd[c - block.first] = static_cast<const A*>(args.rstd)[group];
    }

    std::vector<double> s1(block.mean.size()), s2(block.mean.size());
    block.tiles([&](auto full, std::int64_t c) {
        constexpr bool Full = decltype(full)::value;
        Affine<V> affine[kTile];
        for (int u = 0; u < kTile; ++u) affine[u] = block.affine(c + u * W);
        for (std::int64_t start = 0; start < args.N; start += kRun / W) {
            V part1[kTile]{}, part2[kTile]{};
            for (std::int64_t pixel = start; pixel < std::min(start + kRun / W, args.N); ++pixel) {
                for (int u = 0; u < kTile; ++u) {
                    const std::int64_t at = pixel * args.C + c + u * W, left = block.end - c - u * W;
                    V n, dy;
                    norm_act_slope(args.act, affine[u], load<Full>(x + at, left), load<Full>(g + at, left), n,
                                   dy);
                    part1[u] += dy;
                    part2[u] += dy * n;
                }
            }
            for (int u = 0; u < kTile; ++u) {
                for (int k = 0; k < W; ++k) {
                    s1[c - block.first + u * W + k] += static_cast<double>(part1[u][k]);
                    s2[c - block.first + u * W + k] += static_cast<double>(part2[u][k]);
                }
            }
        }
    });
    for (std::int64_t c = block.first; c < block.end; ++c)
        store_channel_sums<A>(args, block.b, c, s1[c - block.first], s2[c - block.first]);
    if (args.out == nullptr) return;

    std::vector<A> m1(s1.size()), m2(s2.size());
    for (std::int64_t c = 0; c < block.end - block.first; c += channels) {
        double sum1 = 0, sum2 = 0;
        for (std::int64_t k = c; k < c + channels; ++k) {
            sum1 += s1[k] * static_cast<double>(block.gain[k]);
            sum2 += s2[k] * static_cast<double>(block.gain[k]);
        }
        std::fill_n(m1.begin() + c, channels, static_cast<A>(sum1 / size));
        std::fill_n(m2.begin() + c, channels, static_cast<A>(sum2 / size));
    }
    T* const dx = static_cast<T*>(args.out) + offset;
    block.tiles([&](auto full, std::int64_t c) {
        constexpr bool Full = decltype(full)::value;
        constexpr int U =
            kTile / 2;  // six vectors of constants for each: half a tile keeps them in registers
        for (int half = 0; half < kTile; half += U) {
            Affine<V> affine[U];
            V mean1[U], mean2[U];
            for (int u = 0; u < U; ++u) {
                const std::int64_t channel = c + (half + u) * W;
                affine[u] = block.affine(channel);
                mean1[u] = load<true>(&m1[channel - block.first], W);
                mean2[u] = load<true>(&m2[channel - block.first], W);
            }
            for (std::int64_t pixel = 0; pixel < args.N; ++pixel) {
                for (int u = 0; u < U; ++u) {
                    const std::int64_t channel = c + (half + u) * W, at = pixel * args.C + channel;
                    const std::int64_t left = block.end - channel;
                    V n, dy;
                    norm_act_slope(args.act, affine[u], load<Full>(x + at, left), load<Full>(g + at, left), n,
                                   dy);
                    store_lanes<Full, T, V, W>(dx + at, norm_dx(affine[u], n, dy, mean1[u], mean2[u]), left);
                }
            }
        }
    });
}

}  // namespace

void group_norm_silu_backward_cpu(const GroupNormArgs& args, int threads) {
    const std::int64_t elements = args.B * args.C * args.N;
    const bool parallel = threads > 1 && elements >= kGroupNormParallelFrom;
    visit(args.dtype, [&]<class T>(T) {
        const bool stream = streams(args.out, elements * bytes(args.dtype)) && args.N % kLanes<T> == 0;
        const std::int64_t tasks = args.channels_last ? Block<T>::count(args) : args.B * args.G;
        const std::int64_t size = args.C / args.G * args.N;
        const bool kept = !args.channels_last && args.out != nullptr &&
                          size * static_cast<std::int64_t>(sizeof(Acc<T>)) <= kKeptBytes;
#pragma omp parallel num_threads(threads) if (parallel)
        {
            std::vector<Acc<T>> dys(kept ? static_cast<std::size_t>(size) : 0);
#pragma omp for schedule(static)
            for (std::int64_t task = 0; task < tasks; ++task) {
                if (args.channels_last)
                    interleaved<T>(args, task);
                else if (stream)
                    planar<T, true>(args, task, kept, dys.data());
                else
                    planar<T, false>(args, task, kept, dys.data());
            }
        }
    });
}

}  // namespace gas
