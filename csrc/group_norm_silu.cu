#include "group_norm_silu.cuh"

namespace gas {
namespace {

// Stage 1, [B, C, N]: the moments of each piece of a group.
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    planar_moments(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Pieces pieces) {
    constexpr int V = kPerThread<A>;
    for (std::int64_t first = pieces.first(); first < pieces.count(); first += pieces.stride()) {
        const std::int64_t piece = first + pieces.mine();
        const std::int64_t group = piece / pieces.chunks, start = piece % pieces.chunks * pieces.chunk;
        Moments<A> total = {0, 0, 0};
        if (piece < pieces.count()) {
            const std::int64_t base = group * pieces.length;
            const std::int64_t end = base + min(start + pieces.chunk, pieces.length);
            for (std::int64_t at = base + start + pieces.lane() * V; at < end; at += pieces.lanes * V) {
                A x[V];
                load_as(args.dtype, args.x, at, end, pieces.aligned, x);
                const int count = end - at < V ? static_cast<int>(end - at) : V;
                Moments<A> pack = {static_cast<A>(count), 0, 0};
#pragma unroll
                for (int k = 0; k < V; ++k) pack.mean += x[k];  // past the end: zeros
                pack.mean /= pack.count;
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    const A d = k < count ? x[k] - pack.mean : A(0);
                    pack.squares += d * d;
                }
                join(total, pack);
            }
        }
        join_lanes(total, pieces.lanes);
        if (piece < pieces.count() && pieces.lane() == 0) {
            if (pieces.chunks == 1) {
                store_statistics(args, group, total);
            } else {
                A* const parts = static_cast<A*>(args.workspace) + 2 * piece;
                parts[0] = total.mean;
                parts[1] = total.squares;
            }
        }
    }
}

// Stage 1, [B, N, C]: the moments of each channel over `chunk` pixels.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    interleaved_moments(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Tiles tiles) {
    using A = Acc<T>;
    constexpr int V = kPack<T>;
    __shared__ A counts[kThreads], means[V][kThreads], deviations[V][kThreads];
    for (std::int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        const Place<V> place(args, tiles, tile);
        A count = 0, mean[V] = {}, squares[V] = {};
        place.template for_pixels<T, false, 4>(args, tiles.aligned,
                                               [&](std::int64_t, const A(&x)[V], const A(&)[V]) {
                                                   count += 1;
                                                   const A part = quotient(A(1), count);
#pragma unroll
                                                   for (int k = 0; k < V; ++k) {  // Welford's update
                                                       const A delta = x[k] - mean[k];
                                                       mean[k] += delta * part;
                                                       squares[k] += delta * (x[k] - mean[k]);
                                                   }
                                               });
        __syncthreads();  // the last reader is done
        counts[threadIdx.x] = count;
#pragma unroll
        for (int k = 0; k < V; ++k) means[k][threadIdx.x] = mean[k], deviations[k][threadIdx.x] = squares[k];
        __syncthreads();
        for (int i = threadIdx.x; i < V * tiles.columns; i += kThreads) {
            const int column = i / V, k = i % V;
            const std::int64_t channel = place.first_channel + i;
            if (channel >= args.C) continue;
            Moments<A> total = {0, 0, 0};
            for (int at = column; at < kThreads; at += tiles.columns)
                join(total, Moments<A>{counts[at], means[k][at], deviations[k][at]});
            A* const parts = static_cast<A*>(args.workspace) +
                             2 * ((place.b * args.chunks + place.chunk) * args.C + channel);
            parts[0] = total.mean;
            parts[1] = total.squares;
        }
    }
}

// Stage 2: the parts of one group, joined by one block in a fixed order.
template <class A>
__global__ void __launch_bounds__(kThreads, 2) join_moments(const __grid_constant__ GroupNormArgs args) {
    __shared__ Moments<A> shared[kBlockWarps];
    const std::int64_t channels = args.C / args.G, groups = args.B * args.G;
    const std::int64_t length = args.channels_last ? args.N : channels * args.N;
    const std::int64_t parts_of_group = args.channels_last ? args.chunks * channels : args.chunks;
    const A* const parts = static_cast<const A*>(args.workspace);
    for (std::int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
        Moments<A> total = {0, 0, 0};
        for (std::int64_t part = threadIdx.x; part < parts_of_group; part += kThreads) {
            std::int64_t chunk = part, at = group * args.chunks + part;
            if (args.channels_last) {
                chunk = part / channels;
                at = (group / args.G * args.chunks + chunk) * args.C + group % args.G * channels +
                     part % channels;
            }
            const std::int64_t count = min(args.chunk, length - chunk * args.chunk);
            join(total, Moments<A>{static_cast<A>(count), parts[2 * at], parts[2 * at + 1]});
        }
        join_lanes(total, kWarp);
        __syncthreads();  // the last reader is done
        if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = total;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int warp = 1; warp < kBlockWarps; ++warp) join(total, shared[warp]);
            store_statistics(args, group, total);
        }
    }
}

// Stage 3, [B, C, N]: pieces of channels.
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    planar_apply(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Pieces pieces) {
    constexpr int V = kPerThread<A>;
    for (std::int64_t first = pieces.first(); first < pieces.count(); first += pieces.stride()) {
        const std::int64_t piece = first + pieces.mine();
        if (piece >= pieces.count()) break;
        const std::int64_t row = piece / pieces.chunks, start = piece % pieces.chunks * pieces.chunk;
        const std::int64_t base = row * pieces.length;
        const std::int64_t end = base + min(start + pieces.chunk, pieces.length);
        const Affine<A> affine = affine_of<A>(args, row / args.C, row % args.C);
        for (std::int64_t at = base + start + pieces.lane() * V; at < end; at += pieces.lanes * V) {
            A x[V];
            load_as(args.dtype, args.x, at, end, pieces.aligned, x);
#pragma unroll
            for (int k = 0; k < V; ++k) x[k] = activate(args.act, modulated(affine, centred(affine, x[k])));
            store_as(args.dtype, args.out, at, end, pieces.aligned, x);
        }
    }
}

// Stage 3, [B, N, C]: a thread keeps its channels.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    interleaved_apply(const __grid_constant__ GroupNormArgs args, const __grid_constant__ Tiles tiles) {
    using A = Acc<T>;
    constexpr int V = kPack<T>;
    with_act(args.act, [&](auto act) {
        for (std::int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
            const Place<V> place(args, tiles, tile);
            if (place.pixel >= place.end) continue;
            Affine<A> affine[V];
            affines_of(args, place.b, place.channel, affine);
            place.template for_pixels<T, false, 4>(
                args, tiles.aligned, [&](std::int64_t row, A(&x)[V], const A(&)[V]) {
#pragma unroll
                    for (int k = 0; k < V; ++k)
                        x[k] = activate<sizeof(T) == 2>(act, modulated(affine[k], centred(affine[k], x[k])));
                    store_values<T>(args.out, row + place.channel, row + args.C, tiles.aligned, x);
                });
        }
    });
}

}  // namespace

const char* group_norm_silu_cuda(const GroupNormArgs& args, int device, void* stream) {
    if (args.B * args.C * args.N == 0) return nullptr;
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    cudaError_t status = cudaSuccess;
    const auto queue = static_cast<cudaStream_t>(stream);
    const bool aligned = aligned16(args.x) && aligned16(args.out);
    const auto launched = [&] { return (status = cudaGetLastError()) == cudaSuccess; };
    if (group_norm_silu_whole(args, false, queue, status)) return message(status);
    visit_accumulator(args.dtype, [&]<class A>(A) {
        const unsigned groups = blocks_for(args.B * args.G, 1, 1 << 16);
        if (args.channels_last) {
            visit(args.dtype, [&]<class T>(T) {
                if constexpr (std::is_same_v<Acc<T>, A>) {
                    const Tiles tiles = tiles_of<T>(args, aligned);
                    const unsigned blocks = blocks_for(tiles.count, 1, 1 << 16);
                    interleaved_moments<T><<<blocks, kThreads, 0, queue>>>(args, tiles);
                    if (!launched()) return;
                    join_moments<A><<<groups, kThreads, 0, queue>>>(args);
                    if (!launched()) return;
                    interleaved_apply<T><<<blocks, kThreads, 0, queue>>>(args, tiles);
                }
            });
        } else {
            const Pieces sums = pieces_of<A>(args, args.B * args.G, args.C / args.G * args.N, aligned);
            planar_moments<A><<<blocks_of(sums), kThreads, 0, queue>>>(args, sums);
            if (!launched()) return;
            if (args.chunks > 1) join_moments<A><<<groups, kThreads, 0, queue>>>(args);
            if (!launched()) return;
            Pieces rows = pieces_of<A>(args, args.B * args.C, args.N, aligned);
            rows.chunks = (args.N + rows.chunk - 1) / rows.chunk;
            planar_apply<A><<<blocks_of(rows), kThreads, 0, queue>>>(args, rows);
        }
        launched();
    });
    return message(status);
}

}  // namespace gas
