// [B, C, N] with a block for a whole group: one launch, which needs no workspace, and what is read a second
// time is still in the caches.
#include "group_norm_silu.cuh"

namespace gas {
namespace {

constexpr int kWholeThreads = 512, kWholeWarps = kWholeThreads / kWarp, kWholeUnits = 512;

// A warp takes units of a group: each channel makes `parts` of them, of `length` pixels.
struct Whole {
    int threads;  // of a block; 0 where groups are not taken whole
    int channels, parts, pixels, length;
    bool aligned;
};

// Which groups are: those that a block reads in about a launch's time, and larger ones where there are enough
// to fill a card. Only sizes decide, so that every card gives the same sums.
template <class T>
Whole whole_of(const GroupNormArgs& args, bool aligned) {
    constexpr int V = kPerThread<Acc<T>>;
    const std::int64_t channels = args.C / args.G, size = channels * args.N, groups = args.B * args.G;
    if (args.channels_last || args.N % V != 0 || channels > kWholeUnits || groups >= std::int64_t{1} << 31 ||
        size > (groups < 64 ? 1 << 15 : 1 << 20))
        return {};
    Whole whole{kWarp, static_cast<int>(channels), 1, static_cast<int>(args.N), 0, aligned};
    while (whole.threads < kWholeThreads && whole.threads * V < size) whole.threads *= 2;
    // Even shares for the warps, as long as every lane of them has something to do.
    const int warps = whole.threads / kWarp;
    while (whole.channels * whole.parts % warps != 0 && whole.channels * whole.parts * 2 <= kWholeUnits &&
           args.N >= std::int64_t{2} * whole.parts * kWarp * V)
        whole.parts *= 2;
    whole.length = (whole.pixels / V + whole.parts - 1) / whole.parts * V;
    return whole;
}

// Calls body(at, x, g) for packs of V elements, `step` apart, with their values: of x, and of g if it is
// there. U packs are on the way before the first is used, and body may write over what they were read from.
template <class T, bool Both, int U, class Body>
__device__ __forceinline__ void for_packs(const GroupNormArgs& args, std::int64_t base, int first, int end,
                                          int step, bool aligned, Body&& body) {
    using A = Acc<T>;
    constexpr int V = kPerThread<A>;
    const T *const x = static_cast<const T*>(args.x) + base, *const g = static_cast<const T*>(args.g) + base;
    for (int at = first; at < end; at += U * step) {
        Pack<T, V> packs[2][U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            packs[0][u] = {}, packs[1][u] = {};
            const int here = at + u * step;
            if (here >= end) continue;
            packs[0][u] = load<V>(x, here, end, aligned);
            if constexpr (Both) packs[1][u] = load<V>(g, here, end, aligned);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (at + u * step >= end) continue;
            A values[2][V];
#pragma unroll
            for (int k = 0; k < V; ++k) {
                values[0][k] = static_cast<A>(widen(packs[0][u].v[k]));
                values[1][k] = static_cast<A>(widen(packs[1][u].v[k]));
            }
            body(at + u * step, values[0], values[1]);
        }
    }
}

// Calls body(unit, channel, first, end) for each of this warp's units; pixels count from the group's first.
template <class Body>
__device__ __forceinline__ void for_units(const Whole& whole, Body&& body) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    for (int unit = static_cast<int>(threadIdx.x) / kWarp; unit < whole.channels * whole.parts;
         unit += warps) {
        const int channel = unit / whole.parts, start = unit % whole.parts * whole.length;
        const int first = channel * whole.pixels + start;
        body(unit, channel, first, first + min(whole.length, whole.pixels - start));
    }
}

// The moments of V numbers.
template <class A, int V>
__device__ __forceinline__ Moments<A> moments_of(const A (&x)[V]) {
    Moments<A> pack = {static_cast<A>(V), 0, 0};
#pragma unroll
    for (int k = 0; k < V; ++k) pack.mean += x[k];
    pack.mean /= V;
#pragma unroll
    for (int k = 0; k < V; ++k) pack.squares += (x[k] - pack.mean) * (x[k] - pack.mean);
    return pack;
}

// All stages in one, [B, C, N].
template <class T>
__global__ void __launch_bounds__(kWholeThreads, sizeof(T) == 8 ? 1 : 2)
    whole_forward(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Whole whole) {
    using A = Acc<T>;
    constexpr int V = kPerThread<A>;
    __shared__ Moments<A> shared[kWholeWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, size = whole.channels * whole.pixels;
    const std::int64_t group = blockIdx.x, base = group * size;
    Moments<A> total = {0, 0, 0};
    for_packs<T, false, 2>(args, base, threadIdx.x * V, size, blockDim.x * V, whole.aligned,
                           [&](int, const A(&x)[V], const A(&)[V]) { join(total, moments_of(x)); });
    join_lanes(total, kWarp);
    if (lane == 0) shared[warp] = total;
    __syncthreads();
    if (warp == 0) {
        total = lane < blockDim.x / kWarp ? shared[lane] : Moments<A>{0, 0, 0};
        join_lanes(total, kWarp);
        if (lane == 0) {
            store_statistics(args, group, total);
            shared[0] = total;
        }
    }
    __syncthreads();
    const A mean = shared[0].mean, rstd = rstd_of(args, shared[0]);
    with_act(args.act, [&](auto act) {
        for_units(whole, [&](int, int channel, int first, int end) {
            const std::int64_t c = group % args.G * whole.channels + channel;
            const Affine<A> affine = affine_of(args, group / args.G, c, mean, rstd);
            for_packs<T, false, 2>(args, base, first + lane * V, end, kWarp * V, whole.aligned,
                                   [&](int at, A(&x)[V], const A(&)[V]) {
#pragma unroll
                                       for (int k = 0; k < V; ++k)
                                           x[k] = activate<sizeof(T) == 2>(
                                               act, modulated(affine, centred(affine, x[k])));
                                       store_values<T>(args.out, base + at, base + end, whole.aligned, x);
                                   });
        });
    });
}

// All stages in one, [B, C, N].
template <class T>
__global__ void __launch_bounds__(kWholeThreads, sizeof(T) == 8 ? 1 : 2)
    whole_backward(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Whole whole) {
    using A = Acc<T>;
    constexpr int V = kPerThread<A>;
    __shared__ A sums[2][kWholeUnits], means[2];
    const int lane = threadIdx.x % kWarp;
    const std::int64_t group = blockIdx.x, base = group * whole.channels * whole.pixels;
    const std::int64_t b = group / args.G, channel0 = group % args.G * whole.channels;
    with_act(args.act, [&](auto act) {
        for_units(whole, [&](int unit, int channel, int first, int end) {
            const Affine<A> affine = affine_of<A>(args, b, channel0 + channel);
            A s1 = 0, s2 = 0;
            for_packs<T, true, 1>(args, base, first + lane * V, end, kWarp * V, whole.aligned,
                                  [&](int, const A(&x)[V], const A(&g)[V]) {
#pragma unroll
                                      for (int k = 0; k < V; ++k) {
                                          A d, dy;
                                          slope_of<sizeof(T) == 2>(act, affine, x[k], g[k], d, dy);
                                          s1 += dy;
                                          s2 += dy * d;
                                      }
                                  });
            s1 = sum_lanes(s1, kWarp);
            s2 = sum_lanes(s2, kWarp);
            if (lane == 0) sums[0][unit] = s1, sums[1][unit] = s2;
        });
    });
    __syncthreads();
    if (threadIdx.x < kWarp) {
        A sum1 = 0, sum2 = 0;  // of gain S1 and gain S2
        for (int channel = lane; channel < whole.channels; channel += kWarp) {
            A s1 = 0, s2 = 0;
            for (int unit = channel * whole.parts; unit < (channel + 1) * whole.parts; ++unit)
                s1 += sums[0][unit], s2 += sums[1][unit];
            const A gain = store_channel(args, b, channel0 + channel, s1, s2);
            sum1 += gain * s1;
            sum2 += gain * s2;
        }
        sum1 = sum_lanes(sum1, kWarp);
        sum2 = sum_lanes(sum2, kWarp);
        const A size = static_cast<A>(whole.channels * whole.pixels);
        const A rstd = static_cast<const A*>(args.rstd)[group];
        if (lane == 0) means[0] = sum1 / size, means[1] = rstd * rstd * (sum2 / size);
    }
    if (args.out == nullptr) return;
    __syncthreads();
    const A m1 = means[0], m2 = means[1];
    with_act(args.act, [&](auto act) {
        for_units(whole, [&](int, int channel, int first, int end) {
            const Affine<A> affine = affine_of<A>(args, b, channel0 + channel);
            for_packs<T, true, 1>(args, base, first + lane * V, end, kWarp * V, whole.aligned,
                                  [&](int at, A(&x)[V], const A(&g)[V]) {
#pragma unroll
                                      for (int k = 0; k < V; ++k) {
                                          A d, dy;
                                          slope_of<sizeof(T) == 2>(act, affine, x[k], g[k], d, dy);
                                          x[k] = norm_dx(affine, d, dy, m1, m2);
                                      }
                                      store_values<T>(args.out, base + at, base + end, whole.aligned, x);
                                  });
        });
    });
}

}  // namespace

bool group_norm_silu_whole(const GroupNormArgs& args, bool backward, cudaStream_t stream,
                           cudaError_t& status) {
    bool taken = false;
    visit(args.dtype, [&]<class T>(T) {
        const bool aligned = aligned16(args.x) && aligned16(args.out) && aligned16(args.g);
        const Whole whole = whole_of<T>(args, aligned);
        if (whole.threads == 0) return;
        const auto kernel = backward ? whole_backward<T> : whole_forward<T>;
        kernel<<<static_cast<unsigned>(args.B * args.G), whole.threads, 0, stream>>>(args, whole);
        status = cudaGetLastError();
        taken = true;
    });
    return taken;
}

}  // namespace gas
