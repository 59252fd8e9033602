#include "adjoint.h"
#include "launch.cuh"

namespace gas {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kFullMask = 0xffffffffu;

template <class A>
inline constexpr int kTile = kThreads * kPerThread<A>;

constexpr int kBatch = 4;  // cotangents that are loaded, and whose products are summed, together

// Sums N values over a warp in a fixed order, N a power of two: lanes i 32 / N and on end with the i-th sum.
// Lanes half a warp apart add up half of the values for each other, then lanes a quarter apart, and so on.
template <class A, int N>
__device__ __forceinline__ A warp_sums(A (&v)[N]) {
    int step = kWarp / 2;
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2, step /= 2) {
        const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const A sent = upper ? v[i] : v[half + i], kept = upper ? v[half + i] : v[i];
            v[i] = kept + __shfl_xor_sync(kFullMask, sent, step);
        }
    }
#pragma unroll
    for (; step > 0; step /= 2) v[0] += __shfl_xor_sync(kFullMask, v[0], step);
    return v[0];
}

template <class A, bool Step>
__global__ void __launch_bounds__(kThreads, 2)
    adjoint_kernel(const __grid_constant__ AdjointArgs args, bool same, bool aligned) {
    constexpr int V = kPerThread<A>, kProducts = Step ? 2 * kBatch : kBatch;
    __shared__ A a[kMaxStates], b[kMaxStates];
    __shared__ double sums[kWarps][2 * kMaxStates];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int J = args.g.count, products = Step ? 2 * J : J;
    for (int i = lane; i < products; i += kWarp) sums[warp][i] = 0;
    if (Step && threadIdx.x < kMaxStates) {
        a[threadIdx.x] = threadIdx.x < J ? static_cast<A>(args.a[threadIdx.x]) : 0;
        b[threadIdx.x] = threadIdx.x < J ? static_cast<A>(args.b[threadIdx.x]) : 0;
    }
    __syncthreads();

    // Whole warps go round together: the sums over a warp need all of its lanes.
    for (std::int64_t tile = std::int64_t{blockIdx.x} * kTile<A>; tile < args.n;
         tile += std::int64_t{gridDim.x} * kTile<A>) {
        const std::int64_t at = tile + threadIdx.x * V;
        A x[V], f[V], mu[V] = {}, g_x[V] = {};
        load_as(args.x_dtype, args.x, at, args.n, aligned, x);
        if constexpr (Step) load_as(args.f_dtype, args.f, at, args.n, aligned, f);
        for (int first = 0; first < J; first += kBatch) {
            A dot[kProducts] = {};  // with x, then with f
            visit_states<A, false, kBatch, V>(
                args.g, first, same, at, args.n, aligned, [&](int i, const A(&g)[V]) {
#pragma unroll
                    for (int k = 0; k < V; ++k) {
                        if constexpr (Step)
                            adjoint_term(g[k], x[k], f[k], a[first + i], b[first + i], mu[k], g_x[k], dot[i],
                                         dot[kBatch + i]);
                        else
                            dot_term(g[k], x[k], dot[i]);
                    }
                });
            const A sum = warp_sums(dot);
            const int mine = lane / (kWarp / kProducts), i = first + mine % kBatch;
            if (lane % (kWarp / kProducts) == 0 && i < J)
                sums[warp][mine / kBatch * J + i] += static_cast<double>(sum);
        }
        if constexpr (Step) {
            store_as(args.f_dtype, args.mu, at, args.n, aligned, mu);
            store_as(args.x_dtype, args.g_x, at, args.n, aligned, g_x);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < products; i += kThreads) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += sums[w][i];
        args.workspace[std::int64_t{i} * gridDim.x + blockIdx.x] = total;
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

template <class A, bool Step>
cudaError_t launch(const AdjointArgs& args, cudaStream_t stream) {
    const bool aligned = aligned16(args.g) && aligned16(args.x) && aligned16(args.f) && aligned16(args.mu) &&
                         aligned16(args.g_x);
    // An empty state still takes one block: it writes the zero sums.
    const unsigned blocks = blocks_for(args.n, kTile<A>, kReductionBlocks);
    adjoint_kernel<A, Step><<<blocks, kThreads, 0, stream>>>(args, same_dtype(args.g), aligned);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
    const int J = args.g.count;
    sum_partials<<<Step ? 2 * J : J, kThreads, 0, stream>>>(args.workspace, static_cast<int>(blocks), J,
                                                            args.da, args.db);
    return cudaGetLastError();
}

}  // namespace

const char* adjoint_cuda(const AdjointArgs& args, int device, void* stream) {
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    cudaError_t status = cudaSuccess;
    const bool step = args.f != nullptr;
    visit_accumulator(step ? wider(args.x_dtype, args.f_dtype) : args.x_dtype, [&]<class A>(A) {
        const auto queue = static_cast<cudaStream_t>(stream);
        status = step ? launch<A, true>(args, queue) : launch<A, false>(args, queue);
    });
    return message(status);
}

}  // namespace gas
