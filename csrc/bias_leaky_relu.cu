#include "bias_leaky_relu.h"
#include "launch.cuh"

namespace gas {
namespace {

constexpr int kGroup = 8;       // elements of a thread: they share a byte of bits
constexpr int kRunGroups = 64;  // groups summed in A before double takes over
constexpr unsigned kFullMask = 0xffffffffu;

// What a group of eight elements adds: one number for all of a plane, neighbouring ones where channels lie
// side by side, and else one by one.
template <class A>
__device__ __forceinline__ void add_bias(const BiasLeakyReluArgs& args, const A* __restrict__ bias,
                                         std::int64_t at, bool aligned, A (&v)[kGroup]) {
    if (args.inner == 1 && args.channels % kGroup == 0) {
        const auto pack = load<kGroup>(bias, at % args.channels, args.channels, aligned);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) v[k] += pack.v[k];
        return;
    }
    const std::int64_t plane = at / args.inner;
    std::int64_t c = plane % args.channels, left = args.inner - (at - plane * args.inner);
    if (left >= kGroup) {
        const A one = bias[c];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) v[k] += one;
        return;
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
        v[k] += bias[c];
        if (--left == 0) {
            left = args.inner;
            if (++c == args.channels) c = 0;
        }
    }
}

// Forward and masked forward: a thread takes eight elements and their byte at a time, a warp 32 bytes side by
// side.
template <class T>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const __grid_constant__ BiasLeakyReluArgs args, bool aligned) {
    using A = Acc<T>;
    const A* const __restrict__ bias = static_cast<const A*>(args.bias);
    const bool aligned_bias = aligned && reinterpret_cast<std::uintptr_t>(bias) % 16 == 0;
    const A slope = static_cast<A>(args.slope);
    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * kGroup;
    for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kGroup; at < args.n;
         at += stride) {
        auto pack = load<kGroup>(static_cast<const T*>(args.x), at, args.n, aligned);
        unsigned signs = 0;
        if (!args.packs) signs = args.bits[at / kGroup];
        A v[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) v[k] = static_cast<A>(widen(pack.v[k]));
        if (bias != nullptr) add_bias(args, bias, at, aligned_bias, v);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            if (args.packs) signs |= static_cast<unsigned>(v[k] > 0 && at + k < args.n) << k;
            pack.v[k] = narrow<T>(leaky(v[k], slope, (signs >> k & 1u) != 0));
        }
        store<kGroup>(static_cast<T*>(args.y), at, args.n, aligned, pack);
        if (args.packs && args.bits != nullptr) args.bits[at / kGroup] = static_cast<std::uint8_t>(signs);
    }
}

// Calls body(values) with m x, which it stores, of U groups of V elements: V is 8, and where(u) a multiple of
// it, or 1. Below zero: none. All are on the way before the first is used.
template <class T, int V, int U, class Where, class Body>
__device__ __forceinline__ void masked(const BiasLeakyReluArgs& args, Acc<T> slope, bool aligned,
                                       Where&& where, Body&& body) {
    Pack<T, V> packs[U];
    unsigned signs[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const std::int64_t at = where(u);
        packs[u] = {}, signs[u] = 0;
        if (at < 0) continue;
        packs[u] = load<V>(static_cast<const T*>(args.x), at, args.n, aligned);
        signs[u] = args.bits[at / 8] >> (V == 1 ? static_cast<unsigned>(at % 8) : 0u);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const std::int64_t at = where(u);
        if (at < 0) continue;
        Acc<T> v[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
            v[k] = leaky(static_cast<Acc<T>>(widen(packs[u].v[k])), slope, (signs[u] >> k & 1u) != 0);
            packs[u].v[k] = narrow<T>(v[k]);
        }
        store<V>(static_cast<T*>(args.y), at, args.n, aligned, packs[u]);
        body(v);
    }
}

template <int V, class Sum, class A>
__device__ __forceinline__ void add(Sum (&sum)[V], const A (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += static_cast<Sum>(v[k]);
}

// Channels in planes: a block takes one share of one channel, its sum is one first-stage sum.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    backward_planes_kernel(const __grid_constant__ BiasLeakyReluArgs args, int splits, bool aligned) {
    using A = Acc<T>;
    constexpr int U = 2;
    __shared__ double sums[kThreads / kWarp];
    const A slope = static_cast<A>(args.slope);
    const std::int64_t groups = args.inner / V;  // of a plane: V divides it
    const std::int64_t all = args.n / (args.channels * args.inner) * groups;
    for (std::int64_t share = blockIdx.x; share < args.channels * splits; share += gridDim.x) {
        const std::int64_t c = share / splits, split = share % splits;
        double total = 0;
        A run = 0;
        int length = 0;
        const std::int64_t step = std::int64_t{splits} * kThreads;
        for (std::int64_t i = split * kThreads + threadIdx.x; i < all; i += U * step) {
            const auto where = [&](int u) {
                const std::int64_t group = i + u * step, sample = group / groups;
                if (group >= all) return std::int64_t{-1};
                return (sample * args.channels + c) * args.inner + (group - sample * groups) * V;
            };
            masked<T, V, U>(args, slope, aligned, where, [&](const A(&v)[V]) {
#pragma unroll
                for (int k = 0; k < V; ++k) run += v[k];
            });
            if (++length == kRunGroups / U) {
                total += static_cast<double>(run);
                run = 0;
                length = 0;
            }
        }
        total += static_cast<double>(run);
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(kFullMask, total, step);
        __syncthreads();  // the sums of the share before have been read
        if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = total;
        __syncthreads();
        if (threadIdx.x == 0) {
            double sum = 0;
            for (int w = 0; w < kThreads / kWarp; ++w) sum += sums[w];
            args.workspace[split * args.channels + c] = sum;
        }
    }
}

// Channels side by side: a thread keeps V of them and goes down the rows; the threads of a block that keep
// the same ones (threadIdx.y) meet in shared memory.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    backward_rows_kernel(const __grid_constant__ BiasLeakyReluArgs args, int splits, bool aligned) {
    using A = Acc<T>;
    constexpr int U = sizeof(T) == 8 ? 1 : 4;
    __shared__ double sums[kThreads * V];
    const A slope = static_cast<A>(args.slope);
    const std::int64_t rows = args.n / args.channels, columns = args.channels / V;  // V divides the channels
    const std::int64_t tiles = (columns + blockDim.x - 1) / blockDim.x;
    for (std::int64_t share = blockIdx.x; share < tiles * splits; share += gridDim.x) {
        const std::int64_t split = share / tiles, column = share % tiles * blockDim.x + threadIdx.x;
        double total[V] = {};
        if (column < columns) {
            A run[V] = {};
            int length = 0;
            const std::int64_t step = std::int64_t{splits} * blockDim.y;
            for (std::int64_t row = split * blockDim.y + threadIdx.y; row < rows; row += U * step) {
                const auto where = [&](int u) {
                    const std::int64_t here = row + u * step;
                    return here < rows ? here * args.channels + column * V : std::int64_t{-1};
                };
                masked<T, V, U>(args, slope, aligned, where, [&](const A(&v)[V]) { add<V>(run, v); });
                if (++length < kRunGroups / U) continue;
                add<V>(total, run);
                length = 0;
#pragma unroll
                for (int k = 0; k < V; ++k) run[k] = 0;
            }
            add<V>(total, run);
        }
        __syncthreads();  // the sums of the share before have been read
#pragma unroll
        for (int k = 0; k < V; ++k)
            sums[(k * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] = total[k];
        __syncthreads();
        if (threadIdx.y > 0 || column >= columns) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            double sum = 0;
            for (unsigned y = 0; y < blockDim.y; ++y)
                sum += sums[(k * blockDim.y + y) * blockDim.x + threadIdx.x];
            args.workspace[split * args.channels + column * V + k] = sum;
        }
    }
}

// Second stage: the shares of each channel, in their order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    sum_splits(const double* __restrict__ partial, int splits, std::int64_t channels, A* __restrict__ dbias) {
    for (std::int64_t c = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; c < channels;
         c += std::int64_t{gridDim.x} * kThreads) {
        double sum = 0;
#pragma unroll 8
        for (int split = 0; split < splits; ++split) sum += partial[split * channels + c];
        dbias[c] = static_cast<A>(sum);
    }
}

// Shares per unit of `items` groups: enough to fill a card, each long enough to be worth a block. Only the
// sizes decide, so that every card gives the same sums.
int splits_for(std::int64_t units, std::int64_t items, std::int64_t per_round) {
    const std::int64_t rounds = (items + per_round - 1) / per_round;
    return static_cast<int>(std::clamp<std::int64_t>(
        std::min(rounds / 4, 4096 / std::max<std::int64_t>(units, 1)), 1, kBiasSplits));
}

constexpr std::int64_t kMostBlocks = 1 << 20;

template <class T, int V>
cudaError_t backward(const BiasLeakyReluArgs& args, bool aligned, cudaStream_t stream) {
    int splits;
    if (args.inner > 1) {
        splits = splits_for(args.channels, args.n / args.channels / V, kThreads);
        const unsigned blocks = blocks_for(args.channels * splits, 1, kMostBlocks);
        backward_planes_kernel<T, V><<<blocks, kThreads, 0, stream>>>(args, splits, aligned);
    } else {
        const std::int64_t columns = args.channels / V;
        unsigned wide = 1;
        while (wide < kWarp && wide < columns) wide *= 2;
        const dim3 block(wide, kThreads / wide);
        const std::int64_t tiles = (columns + wide - 1) / wide;
        splits = splits_for(tiles, args.n / args.channels, block.y);
        const unsigned blocks = blocks_for(tiles * splits, 1, kMostBlocks);
        backward_rows_kernel<T, V><<<blocks, block, 0, stream>>>(args, splits, aligned);
    }
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
    using A = Acc<T>;
    sum_splits<A><<<blocks_for(args.channels, kThreads), kThreads, 0, stream>>>(
        args.workspace, splits, args.channels, static_cast<A*>(args.dbias));
    return cudaGetLastError();
}

}  // namespace

const char* bias_leaky_relu_cuda(const BiasLeakyReluArgs& args, int device, void* stream) {
    if (args.n == 0) return nullptr;
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    cudaError_t status = cudaSuccess;
    const auto queue = static_cast<cudaStream_t>(stream);
    const bool aligned = aligned16(args.x) && aligned16(args.y);
    visit(args.dtype, [&]<class T>(T) {
        if (args.dbias == nullptr) {
            const unsigned blocks = blocks_for(args.n, kThreads * kGroup);
            elementwise_kernel<T><<<blocks, kThreads, 0, queue>>>(args, aligned);
            status = cudaGetLastError();
        } else if ((args.inner > 1 ? args.inner : args.channels) % kGroup == 0) {
            status = backward<T, kGroup>(args, aligned, queue);
        } else {
            status = backward<T, 1>(args, aligned, queue);
        }
    });
    return message(status);
}

}  // namespace gas
