#include "group_norm_silu.cuh"

namespace gas {
namespace {

// The workspace: S1 and S2 of every part, then m1 and m2 of every group.
template <class A>
__device__ __forceinline__ A* group_means(const GroupNormArgs& args) {
    return static_cast<A*>(args.workspace) + 2 * args.B * args.C * args.chunks;
}

// Stage 1, [B, C, N]: S1 and S2 of each piece of a channel.
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    planar_sums(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Pieces pieces) {
    constexpr int V = kPerThread<A>;
    for (std::int64_t first = pieces.first(); first < pieces.count(); first += pieces.stride()) {
        const std::int64_t piece = first + pieces.mine();
        A s1 = 0, s2 = 0;
        if (piece < pieces.count()) {
            const std::int64_t row = piece / pieces.chunks, start = piece % pieces.chunks * pieces.chunk;
            const std::int64_t base = row * pieces.length;
            const std::int64_t end = base + min(start + pieces.chunk, pieces.length);
            const Affine<A> affine = affine_of<A>(args, row / args.C, row % args.C);
            for (std::int64_t at = base + start + pieces.lane() * V; at < end; at += pieces.lanes * V) {
                A x[V], g[V];
                load_as(args.dtype, args.x, at, end, pieces.aligned, x);
                load_as(args.dtype, args.g, at, end, pieces.aligned, g);  // past the end: zeros
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    A d, dy;
                    slope_of(args.act, affine, x[k], g[k], d, dy);
                    s1 += dy;
                    s2 += dy * d;
                }
            }
        }
        s1 = sum_lanes(s1, pieces.lanes);
        s2 = sum_lanes(s2, pieces.lanes);
        if (piece < pieces.count() && pieces.lane() == 0) {
            A* const parts = static_cast<A*>(args.workspace) + 2 * piece;
            parts[0] = s1;
            parts[1] = s2;
        }
    }
}

// Stage 1, [B, N, C]: S1 and S2 of each channel over `chunk` pixels.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    interleaved_sums(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Tiles tiles) {
    using A = Acc<T>;
    constexpr int V = kPack<T>;
    __shared__ A shared[2][V][kThreads];
    with_act(args.act, [&](auto act) {
        for (std::int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
            const Place<V> place(args, tiles, tile);
            A s1[V] = {}, s2[V] = {};
            if (place.pixel < place.end) {
                Affine<A> affine[V];
                affines_of(args, place.b, place.channel, affine);
                place.template for_pixels<T, true, 2>(
                    args, tiles.aligned, [&](std::int64_t, const A(&x)[V], const A(&g)[V]) {
#pragma unroll
                        for (int k = 0; k < V; ++k) {
                            A d, dy;
                            slope_of<sizeof(T) == 2>(act, affine[k], x[k], g[k], d, dy);
                            s1[k] += dy;
                            s2[k] += dy * d;
                        }
                    });
            }
            __syncthreads();  // the last reader is done
#pragma unroll
            for (int k = 0; k < V; ++k) shared[0][k][threadIdx.x] = s1[k], shared[1][k][threadIdx.x] = s2[k];
            __syncthreads();
            for (int i = threadIdx.x; i < V * tiles.columns; i += kThreads) {
                const int column = i / V, k = i % V;
                const std::int64_t channel = place.first_channel + i;
                if (channel >= args.C) continue;
                A sum1 = 0, sum2 = 0;
                for (int at = column; at < kThreads; at += tiles.columns)
                    sum1 += shared[0][k][at], sum2 += shared[1][k][at];
                A* const parts = static_cast<A*>(args.workspace) +
                                 2 * ((place.b * args.chunks + place.chunk) * args.C + channel);
                parts[0] = sum1;
                parts[1] = sum2;
            }
        }
    });
}

// Stage 2: one block per group, one warp per channel. Writes dshift = S1 and dscale = weight rstd S2 + bias
// S1.
template <class A>
__global__ void __launch_bounds__(kThreads, 2) group_sums(const __grid_constant__ GroupNormArgs args) {
    __shared__ A shared[2][kBlockWarps];
    const std::int64_t channels = args.C / args.G, groups = args.B * args.G;
    const A* const parts = static_cast<const A*>(args.workspace);
    A* const means = group_means<A>(args);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (std::int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
        const std::int64_t b = group / args.G;
        const A rstd = static_cast<const A*>(args.rstd)[group];
        A sum1 = 0, sum2 = 0;  // of gain S1 and gain S2, over this warp's channels
        for (std::int64_t k = warp; k < channels; k += kBlockWarps) {
            const std::int64_t c = group % args.G * channels + k;
            A s1 = 0, s2 = 0;
            for (std::int64_t chunk = lane; chunk < args.chunks; chunk += kWarp) {
                const std::int64_t at = args.channels_last ? (b * args.chunks + chunk) * args.C + c
                                                           : (b * args.C + c) * args.chunks + chunk;
                s1 += parts[2 * at];
                s2 += parts[2 * at + 1];
            }
            s1 = sum_lanes(s1, kWarp);
            s2 = sum_lanes(s2, kWarp);
            if (lane == 0) {
                const A gain = store_channel(args, b, c, s1, s2);
                sum1 += gain * s1;
                sum2 += gain * s2;
            }
        }
        __syncthreads();  // the last reader is done
        if (lane == 0) {
            shared[0][warp] = sum1;
            shared[1][warp] = sum2;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < kBlockWarps; ++w) {
                sum1 += shared[0][w];
                sum2 += shared[1][w];
            }
            const A size = static_cast<A>(channels * args.N);
            means[2 * group] = sum1 / size;
            means[2 * group + 1] = rstd * rstd * (sum2 / size);
        }
    }
}

// Stage 3, [B, C, N].
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    planar_dx(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Pieces pieces) {
    constexpr int V = kPerThread<A>;
    for (std::int64_t first = pieces.first(); first < pieces.count(); first += pieces.stride()) {
        const std::int64_t piece = first + pieces.mine();
        if (piece >= pieces.count()) break;
        const std::int64_t row = piece / pieces.chunks, start = piece % pieces.chunks * pieces.chunk;
        const std::int64_t base = row * pieces.length;
        const std::int64_t end = base + min(start + pieces.chunk, pieces.length);
        const std::int64_t b = row / args.C, c = row % args.C;
        const Affine<A> affine = affine_of<A>(args, b, c);
        const A* const means = group_means<A>(args) + 2 * (b * args.G + c / (args.C / args.G));
        const A m1 = means[0], m2 = means[1];
        for (std::int64_t at = base + start + pieces.lane() * V; at < end; at += pieces.lanes * V) {
            A x[V], g[V];
            load_as(args.dtype, args.x, at, end, pieces.aligned, x);
            load_as(args.dtype, args.g, at, end, pieces.aligned, g);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                A d, dy;
                slope_of(args.act, affine, x[k], g[k], d, dy);
                x[k] = norm_dx(affine, d, dy, m1, m2);
            }
            store_as(args.dtype, args.out, at, end, pieces.aligned, x);
        }
    }
}

// Stage 3, [B, N, C].
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    interleaved_dx(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Tiles tiles) {
    using A = Acc<T>;
    constexpr int V = kPack<T>;
    with_act(args.act, [&](auto act) {
        for (std::int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
            const Place<V> place(args, tiles, tile);
            if (place.pixel >= place.end) continue;
            Affine<A> affine[V];
            affines_of(args, place.b, place.channel, affine);
            A m1[V], m2[V];
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const std::int64_t c = min(place.channel + k, args.C - 1);
                const A* const means = group_means<A>(args) + 2 * (place.b * args.G + c / (args.C / args.G));
                m1[k] = means[0], m2[k] = means[1];
            }
            place.template for_pixels<T, true, 2>(
                args, tiles.aligned, [&](std::int64_t row, A(&x)[V], const A(&g)[V]) {
#pragma unroll
                    for (int k = 0; k < V; ++k) {
                        A d, dy;
                        slope_of<sizeof(T) == 2>(act, affine[k], x[k], g[k], d, dy);
                        x[k] = norm_dx(affine[k], d, dy, m1[k], m2[k]);
                    }
                    store_values<T>(args.out, row + place.channel, row + args.C, tiles.aligned, x);
                });
        }
    });
}

}  // namespace

const char* group_norm_silu_backward_cuda(const GroupNormArgs& args, int device, void* stream) {
    if (args.B * args.C * args.N == 0) return nullptr;
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    cudaError_t status = cudaSuccess;
    const auto queue = static_cast<cudaStream_t>(stream);
    const bool aligned = aligned16(args.x) && aligned16(args.g) && aligned16(args.out);
    const auto launched = [&] { return (status = cudaGetLastError()) == cudaSuccess; };
    if (group_norm_silu_whole(args, true, queue, status)) return message(status);
    visit_accumulator(args.dtype, [&]<class A>(A) {
        const unsigned groups = blocks_for(args.B * args.G, 1, 1 << 16);
        if (args.channels_last) {
            visit(args.dtype, [&]<class T>(T) {
                if constexpr (std::is_same_v<Acc<T>, A>) {
                    const Tiles tiles = tiles_of<T>(args, aligned);
                    const unsigned blocks = blocks_for(tiles.count, 1, 1 << 16);
                    interleaved_sums<T><<<blocks, kThreads, 0, queue>>>(args, tiles);
                    if (!launched()) return;
                    group_sums<A><<<groups, kThreads, 0, queue>>>(args);
                    if (!launched() || args.out == nullptr) return;
                    interleaved_dx<T><<<blocks, kThreads, 0, queue>>>(args, tiles);
                }
            });
        } else {
            const Pieces rows = pieces_of<A>(args, args.B * args.C, args.N, aligned);
            planar_sums<A><<<blocks_of(rows), kThreads, 0, queue>>>(args, rows);
            if (!launched()) return;
            group_sums<A><<<groups, kThreads, 0, queue>>>(args);
            if (!launched() || args.out == nullptr) return;
            planar_dx<A><<<blocks_of(rows), kThreads, 0, queue>>>(args, rows);
        }
        launched();
    });
    return message(status);
}

}  // namespace gas
