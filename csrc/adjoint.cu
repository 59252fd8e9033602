#include <algorithm>

#include "adjoint.h"
#include "launch.cuh"

namespace gas {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kFullMask = 0xffffffffu;

// Eight elements per thread and lag (four doubles): one or two 16-byte loads in flight for each of x, f and
// g.
template <class T>
inline constexpr int kPacks = sizeof(T) == 2 ? 1 : 2;
template <class T>
inline constexpr int kTile = kThreads * kPack<T> * kPacks<T>;

// Sum both values over a warp in a fixed order; lane 0 ends with the first sum, lane 16 with the second.
template <class A>
__device__ __forceinline__ A warp_sums(A first, A second) {
    first += __shfl_xor_sync(kFullMask, first, 16);
    second += __shfl_xor_sync(kFullMask, second, 16);
    A mine = (threadIdx.x & 16) == 0 ? first : second;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) mine += __shfl_xor_sync(kFullMask, mine, step);
    return mine;
}

template <class T, bool Step>
__global__ void __launch_bounds__(kThreads)
    adjoint_kernel(const T* __restrict__ x, const T* __restrict__ f, const __grid_constant__ Pointers g,
                   int J, const double* __restrict__ a, const double* __restrict__ b, T* mu, T* g_x,
                   double* __restrict__ partial, std::int64_t n, bool aligned) {
    using A = Acc<T>;
    constexpr int V = kPack<T>, P = kPacks<T>;
    __shared__ A ca[kMaxStates], cb[kMaxStates];
    __shared__ double sums[kWarps][2 * kMaxStates];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, products = Step ? 2 * J : J;
    for (int i = lane; i < products; i += kWarp) sums[warp][i] = 0;
    if (Step && threadIdx.x < J) {
        ca[threadIdx.x] = static_cast<A>(a[threadIdx.x]);
        cb[threadIdx.x] = static_cast<A>(b[threadIdx.x]);
    }
    __syncthreads();

    for (std::int64_t tile = std::int64_t{blockIdx.x} * kTile<T>; tile < n;
         tile += std::int64_t{gridDim.x} * kTile<T>) {
        const std::int64_t at =
            tile + threadIdx.x * V;  // packs of one thread lie kThreads packs apart: coalesced
        Pack<T, V> x_pack[P], f_pack[P];
        A mu_sum[P][V] = {}, gx_sum[P][V] = {};
#pragma unroll
        for (int p = 0; p < P; ++p) {
            x_pack[p] = load<V>(x, at + p * kThreads * V, n, aligned);
            if constexpr (Step) f_pack[p] = load<V>(f, at + p * kThreads * V, n, aligned);
        }
#pragma unroll 2
        for (int i = 0; i < J; ++i) {
            A da = 0, db = 0;
#pragma unroll
            for (int p = 0; p < P; ++p) {
                const auto pack = load<V>(static_cast<const T*>(g.at[i]), at + p * kThreads * V, n, aligned);
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    const A g_k = widen(pack.v[k]), x_k = widen(x_pack[p].v[k]);
                    if constexpr (Step) {
                        adjoint_term(g_k, x_k, static_cast<A>(widen(f_pack[p].v[k])), ca[i], cb[i],
                                     mu_sum[p][k], gx_sum[p][k], da, db);
                    } else {
                        dot_term(g_k, x_k, da);
                    }
                }
            }
            const A sum = warp_sums(da, db);
            if (lane == 0) sums[warp][i] += static_cast<double>(sum);
            if (Step && lane == 16) sums[warp][J + i] += static_cast<double>(sum);
        }
        if constexpr (Step) {
#pragma unroll
            for (int p = 0; p < P; ++p) {
                Pack<T, V> mu_pack, gx_pack;
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    mu_pack.v[k] = narrow<T>(mu_sum[p][k]);
                    gx_pack.v[k] = narrow<T>(gx_sum[p][k]);
                }
                store<V>(mu, at + p * kThreads * V, n, aligned, mu_pack);
                store<V>(g_x, at + p * kThreads * V, n, aligned, gx_pack);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < products; i += kThreads) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += sums[w][i];
        partial[std::int64_t{i} * gridDim.x + blockIdx.x] = total;
    }
}

// Second stage: block i adds the partial sums of product i, in the same order every time.
__global__ void __launch_bounds__(kThreads)
    sum_partials(const double* __restrict__ partial, int blocks, int J, double* da, double* db) {
    __shared__ double sums[kThreads];
    const double* mine = partial + std::int64_t{blockIdx.x} * blocks;
    double total = 0;
    for (int k = threadIdx.x; k < blocks; k += kThreads) total += mine[k];
    sums[threadIdx.x] = total;
    for (int step = kThreads / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    }
    if (threadIdx.x > 0) return;
    const int i = blockIdx.x;
    (i < J ? da[i] : db[i - J]) = sums[0];
}

template <class T, bool Step>
cudaError_t launch(const AdjointArgs& args, cudaStream_t stream) {
    bool aligned = aligned16(args.x) && aligned16(args.f) && aligned16(args.mu) && aligned16(args.g_x);
    for (int i = 0; i < args.J; ++i) aligned = aligned && aligned16(args.g[i]);
    const std::int64_t tiles = (args.n + kTile<T> - 1) / kTile<T>;
    // An empty state still takes one block: it writes the zero sums.
    const int blocks = static_cast<int>(std::clamp<std::int64_t>(tiles, 1, kReductionBlocks));
    adjoint_kernel<T, Step><<<blocks, kThreads, 0, stream>>>(
        static_cast<const T*>(args.x), static_cast<const T*>(args.f), by_value(args.g, args.J), args.J,
        args.a, args.b, static_cast<T*>(args.mu), static_cast<T*>(args.g_x), args.workspace, args.n, aligned);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
    sum_partials<<<Step ? 2 * args.J : args.J, kThreads, 0, stream>>>(args.workspace, blocks, args.J, args.da,
                                                                      args.db);
    return cudaGetLastError();
}

}  // namespace

const char* adjoint_cuda(const AdjointArgs& args, int device, void* stream) {
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return message(status);
    visit(args.dtype, [&](auto t) {
        using T = decltype(t);
        const auto queue = static_cast<cudaStream_t>(stream);
        status = args.f != nullptr ? launch<T, true>(args, queue) : launch<T, false>(args, queue);
    });
    return message(status);
}

}  // namespace gas
