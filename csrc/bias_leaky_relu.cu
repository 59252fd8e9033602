#include "bias_leaky_relu.h"
#include "launch.cuh"

namespace gas {
namespace {

constexpr int kGroup = 8;       // elements of a thread: they share a byte of bits
constexpr int kRunGroups = 64;  // groups summed in A before double takes over
constexpr unsigned kFullMask = 0xffffffffu;

// Forward and masked forward: a thread takes eight elements and their byte, a warp 32 bytes side by side.
template <class A>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const __grid_constant__ BiasLeakyReluArgs args, bool aligned) {
    const A* const __restrict__ bias = static_cast<const A*>(args.bias);
    const A slope = static_cast<A>(args.slope);
    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * kGroup;
    for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kGroup; at < args.n;
         at += stride) {
        A v[kGroup];
        load_as(args.dtype, args.x, at, args.n, aligned, v);
        if (bias != nullptr) {
            const std::int64_t plane = at / args.inner;
            std::int64_t c = plane % args.channels, left = args.inner - (at - plane * args.inner);
            if (left >= kGroup) {  // all in one plane
                const A one = bias[c];
#pragma unroll
                for (int k = 0; k < kGroup; ++k) v[k] += one;
            } else {
#pragma unroll
                for (int k = 0; k < kGroup; ++k) {
                    v[k] += bias[c];
                    if (--left == 0) {
                        left = args.inner;
                        if (++c == args.channels) c = 0;
                    }
                }
            }
        }
        unsigned signs = 0;
        if (!args.packs) signs = args.bits[at / kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            if (args.packs) signs |= static_cast<unsigned>(v[k] > 0 && at + k < args.n) << k;
            v[k] = leaky(v[k], slope, (signs >> k & 1u) != 0);
        }
        store_as(args.dtype, args.y, at, args.n, aligned, v);
        if (args.packs && args.bits != nullptr) args.bits[at / kGroup] = static_cast<std::uint8_t>(signs);
    }
}

// m x of V elements from `at` on; V is 8, and `at` a multiple of it, or 1. `end` bounds them.
template <class A, int V>
__device__ __forceinline__ void masked(const BiasLeakyReluArgs& args, A slope, std::int64_t at, bool aligned,
                                       A (&v)[V]) {
    load_as(args.dtype, args.x, at, args.n, aligned, v);
    const unsigned signs = args.bits[at / 8] >> (V == 1 ? static_cast<unsigned>(at % 8) : 0u);
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = leaky(v[k], slope, (signs >> k & 1u) != 0);
    A stored[V];
#pragma unroll
    for (int k = 0; k < V; ++k) stored[k] = v[k];
    store_as(args.dtype, args.y, at, args.n, aligned, stored);
}

template <int V, class Sum, class A>
__device__ __forceinline__ void add(Sum (&sum)[V], const A (&v)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += static_cast<Sum>(v[k]);
}

// Channels in planes: a block takes one share of one channel, its sum is one first-stage sum.
template <class A, int V>
__global__ void __launch_bounds__(kThreads)
    backward_planes_kernel(const __grid_constant__ BiasLeakyReluArgs args, int splits, bool aligned) {
    __shared__ double sums[kThreads / kWarp];
    const A slope = static_cast<A>(args.slope);
    const std::int64_t groups = args.inner / V;  // of a plane: V divides it
    const std::int64_t all = args.n / (args.channels * args.inner) * groups;
    for (std::int64_t share = blockIdx.x; share < args.channels * splits; share += gridDim.x) {
        const std::int64_t c = share / splits, split = share % splits;
        double total = 0;
        A run = 0;
        int length = 0;
        for (std::int64_t i = split * kThreads + threadIdx.x; i < all; i += std::int64_t{splits} * kThreads) {
            const std::int64_t sample = i / groups;
            A v[V];
            masked(args, slope, (sample * args.channels + c) * args.inner + (i - sample * groups) * V,
                   aligned, v);
#pragma unroll
            for (int k = 0; k < V; ++k) run += v[k];
            if (++length == kRunGroups) {
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
template <class A, int V>
__global__ void __launch_bounds__(kThreads)
    backward_rows_kernel(const __grid_constant__ BiasLeakyReluArgs args, int splits, bool aligned) {
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
            for (std::int64_t row = split * blockDim.y + threadIdx.y; row < rows;
                 row += std::int64_t{splits} * blockDim.y) {
                A v[V];
                masked(args, slope, row * args.channels + column * V, aligned, v);
                if constexpr (std::is_same_v<A, double>) {
                    add<V>(total, v);
                } else {
                    add<V>(run, v);
                    if (++length < kRunGroups) continue;
                    add<V>(total, run);
                    length = 0;
#pragma unroll
                    for (int k = 0; k < V; ++k) run[k] = 0;
                }
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

template <class A, int V>
cudaError_t backward(const BiasLeakyReluArgs& args, bool aligned, cudaStream_t stream) {
    int splits;
    if (args.inner > 1) {
        splits = splits_for(args.channels, args.n / args.channels / V, kThreads);
        const unsigned blocks = blocks_for(args.channels * splits, 1, kMostBlocks);
        backward_planes_kernel<A, V><<<blocks, kThreads, 0, stream>>>(args, splits, aligned);
    } else {
        const std::int64_t columns = args.channels / V;
        unsigned wide = 1;
        while (wide < kWarp && wide < columns) wide *= 2;
        const dim3 block(wide, kThreads / wide);
        const std::int64_t tiles = (columns + wide - 1) / wide;
        splits = splits_for(tiles, args.n / args.channels, block.y);
        const unsigned blocks = blocks_for(tiles * splits, 1, kMostBlocks);
        backward_rows_kernel<A, V><<<blocks, block, 0, stream>>>(args, splits, aligned);
    }
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
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
    visit_accumulator(args.dtype, [&]<class A>(A) {
        if (args.dbias == nullptr) {
            const unsigned blocks = blocks_for(args.n, kThreads * kGroup);
            elementwise_kernel<A><<<blocks, kThreads, 0, queue>>>(args, aligned);
            status = cudaGetLastError();
        } else if ((args.inner > 1 ? args.inner : args.channels) % kGroup == 0) {
            status = backward<A, kGroup>(args, aligned, queue);
        } else {
            status = backward<A, 1>(args, aligned, queue);
        }
    });
    return message(status);
}

}  // namespace gas
