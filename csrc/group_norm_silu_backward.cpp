#include "group_norm_silu.h"
#include "group_norm_silu_host.h"

namespace gas {
namespace {

// dy of a group is kept between the two passes where it fits here: cheaper than a second exponential. The
// numbers are the same either way.
constexpr std::int64_t kKeptBytes = 128 << 10;

// Vectors side by side: the registers hold x, g, n, dy and the exponential of no more.
constexpr int kPair = 2;

double square(double rstd) { return rstd * rstd; }

// d and dy = g act'(y) of U vectors.
template <int U, class V>
GAS_HD void slopes(Act act, const Affine<V>* affine, const V (&x)[U], const V (&g)[U], V (&d)[U],
                   V (&dy)[U]) {
    for (int u = 0; u < U; ++u) {
        d[u] = centred(affine[u], x[u]);
        dy[u] = modulated(affine[u], d[u]);
    }
    activate_slopes(act, dy);
    for (int u = 0; u < U; ++u) dy[u] = g[u] * dy[u];
}

// One group of [B, C, N].
template <class T, bool Stream, class Choice>
void planar(Choice act, const GroupNormArgs& args, std::int64_t group, bool kept, Acc<T>* dys) {
    using A = Acc<T>;
    constexpr int W = kLanes<T>;
    using V = Vec<A, W>;
    const std::int64_t N = args.N, channels = args.C / args.G, size = channels * N;
    const std::int64_t b = group / args.G, first = group % args.G * channels;
    const T* const x = static_cast<const T*>(args.x) + group * size;
    const T* const g = static_cast<const T*>(args.g) + b * args.g_stride + first * N;
    const A mean = static_cast<const A*>(args.mean)[group], rstd = static_cast<const A*>(args.rstd)[group];
    Affine<V> affine[kPair];
    const auto set_affine = [&](std::int64_t c) {
        A gain, offset;
        folded(args, b, first + c, gain, offset);
        std::fill_n(affine, kPair, Affine<V>{V{} + mean, V{} + rstd, V{} + gain, V{} + offset});
        return static_cast<double>(gain);
    };
    // Calls body(U, full, at), both constants, for kPair vectors at a time, for single ones, for the rest.
    const auto sweep = [](std::int64_t at, std::int64_t end, auto&& body) {
        for (; at + kPair * W <= end; at += kPair * W)
            body(std::integral_constant<int, kPair>{}, std::true_type{}, at);
        for (; at + W <= end; at += W) body(std::integral_constant<int, 1>{}, std::true_type{}, at);
        if (at < end) body(std::integral_constant<int, 1>{}, std::false_type{}, at);
    };

    double sum1 = 0, sum2 = 0;
    for (std::int64_t c = 0; c < channels; ++c) {
        const double gain = set_affine(c);
        double s1 = 0, s2 = 0;
        for (std::int64_t start = c * N; start < (c + 1) * N; start += kRun) {
            const std::int64_t end = std::min(start + kRun, (c + 1) * N);
            V part1[kPair]{}, part2[kPair]{};
            sweep(start, end, [&]<int U>(std::integral_constant<int, U>, auto full, std::int64_t at) {
                constexpr bool Full = decltype(full)::value;
                V xs[U], gs[U], d[U], dy[U];  // past the end gs is zero, and so is dy
                for (int u = 0; u < U; ++u) {
                    xs[u] = load<Full>(x + at + u * W, end - at);
                    gs[u] = load<Full>(g + at + u * W, end - at);
                }
                slopes(act, affine, xs, gs, d, dy);
                for (int u = 0; u < U; ++u) {
                    part1[u] += dy[u];
                    part2[u] += dy[u] * d[u];
                    if (kept) store_lanes<Full, A, V, W>(dys + at + u * W, dy[u], end - at);
                }
            });
            s1 += lane_sum(part1[0] + part1[1]);
            s2 += lane_sum(part2[0] + part2[1]);
        }
        store_channel_sums(args, b, first + c, rstd, s1, s2);
        sum1 += s1 * gain, sum2 += s2 * gain;
    }
    if (args.out == nullptr) return;

    const V m1 = V{} + static_cast<A>(sum1 / size), m2 = V{} + static_cast<A>(square(rstd) * sum2 / size);
    T* const dx = static_cast<T*>(args.out) + group * size;
    for (std::int64_t c = 0; c < channels; ++c) {
        set_affine(c);
        const std::int64_t end = (c + 1) * N;
        sweep(c * N, end, [&]<int U>(std::integral_constant<int, U>, auto full, std::int64_t at) {
            constexpr bool Full = decltype(full)::value;
            V xs[U], d[U], dy[U];
            for (int u = 0; u < U; ++u) xs[u] = load<Full>(x + at + u * W, end - at);
            if (kept) {
                for (int u = 0; u < U; ++u) {
                    d[u] = centred(affine[0], xs[u]);
                    dy[u] = load<Full>(dys + at + u * W, end - at);
                }
            } else {
                V gs[U];
                for (int u = 0; u < U; ++u) gs[u] = load<Full>(g + at + u * W, end - at);
                slopes(act, affine, xs, gs, d, dy);
            }
            for (int u = 0; u < U; ++u)
                store_lanes<Full, T, V, W, Full && Stream>(dx + at + u * W,
                                                           norm_dx(affine[0], d[u], dy[u], m1, m2), end - at);
        });
    }
    if constexpr (Stream) stream_fence();
}

// Whole groups of one sample of [B, N, C].
template <class T, class Choice>
void interleaved(Choice act, const GroupNormArgs& args, std::int64_t index) {
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
    // Calls body(full, c), full a constant, for each kPair vectors of channels.
    const auto pairs = [&](auto&& body) {
        block.tiles([&](auto full, std::int64_t c) {
            for (int u = 0; u < kTile; u += kPair) body(full, c + u * W);
        });
    };
    pairs([&](auto full, std::int64_t c) {
        constexpr bool Full = decltype(full)::value;
        Affine<V> affine[kPair];
        for (int u = 0; u < kPair; ++u) affine[u] = block.affine(c + u * W);
        for (std::int64_t start = 0; start < args.N; start += kRun / W) {
            V part1[kPair]{}, part2[kPair]{};
            for (std::int64_t pixel = start; pixel < std::min(start + kRun / W, args.N); ++pixel) {
                const std::int64_t at = pixel * args.C + c, left = block.end - c;
                V xs[kPair], gs[kPair], d[kPair], dy[kPair];
                for (int u = 0; u < kPair; ++u) {
                    xs[u] = load<Full>(x + at + u * W, left - u * W);
                    gs[u] = load<Full>(g + at + u * W, left - u * W);
                }
                slopes(act, affine, xs, gs, d, dy);
                for (int u = 0; u < kPair; ++u) {
                    part1[u] += dy[u];
                    part2[u] += dy[u] * d[u];
                }
            }
            for (int u = 0; u < kPair; ++u) {
                for (int k = 0; k < W; ++k) {
                    s1[c - block.first + u * W + k] += static_cast<double>(part1[u][k]);
                    s2[c - block.first + u * W + k] += static_cast<double>(part2[u][k]);
                }
            }
        }
    });
    for (std::int64_t c = block.first; c < block.end; ++c)
        store_channel_sums(args, block.b, c, block.rstd[c - block.first], s1[c - block.first],
                           s2[c - block.first]);
    if (args.out == nullptr) return;

    std::vector<A> m1(s1.size()), m2(s2.size());
    for (std::int64_t c = 0; c < block.end - block.first; c += channels) {
        double sum1 = 0, sum2 = 0;
        for (std::int64_t k = c; k < c + channels; ++k) {
            sum1 += s1[k] * static_cast<double>(block.gain[k]);
            sum2 += s2[k] * static_cast<double>(block.gain[k]);
        }
        std::fill_n(m1.begin() + c, channels, static_cast<A>(sum1 / size));
        std::fill_n(m2.begin() + c, channels, static_cast<A>(square(block.rstd[c]) * sum2 / size));
    }
    T* const dx = static_cast<T*>(args.out) + offset;
    pairs([&](auto full, std::int64_t c) {
        constexpr bool Full = decltype(full)::value;
        Affine<V> affine[kPair];
        V mean1[kPair], mean2[kPair];
        for (int u = 0; u < kPair; ++u) {
            affine[u] = block.affine(c + u * W);
            mean1[u] = load<true>(&m1[c + u * W - block.first], W);
            mean2[u] = load<true>(&m2[c + u * W - block.first], W);
        }
        for (std::int64_t pixel = 0; pixel < args.N; ++pixel) {
            const std::int64_t at = pixel * args.C + c, left = block.end - c;
            V xs[kPair], gs[kPair], d[kPair], dy[kPair];
            for (int u = 0; u < kPair; ++u) {
                xs[u] = load<Full>(x + at + u * W, left - u * W);
                gs[u] = load<Full>(g + at + u * W, left - u * W);
            }
            slopes(act, affine, xs, gs, d, dy);
            for (int u = 0; u < kPair; ++u) {
                const V result = norm_dx(affine[u], d[u], dy[u], mean1[u], mean2[u]);
                store_lanes<Full, T, V, W>(dx + at + u * W, result, left - u * W);
            }
        }
    });
}

}  // namespace

void group_norm_silu_backward_cpu(const GroupNormArgs& args, int threads) {
    const std::int64_t elements = args.B * args.C * args.N;
    const bool parallel = threads > 1 && elements >= kGroupNormParallelFrom;
    const auto run = [&]<class T>(T, auto act) {
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
                    interleaved<T>(act, args, task);
                else if (stream)
                    planar<T, true>(act, args, task, kept, dys.data());
                else
                    planar<T, false>(act, args, task, kept, dys.data());
            }
        }
    };
    visit(args.dtype, [&](auto zero) { with_act(zero, args.act, [&](auto act) { run(zero, act); }); });
}

}  // namespace gas
