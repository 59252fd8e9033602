#include "launch.cuh"
#include "lincomb.h"

namespace gas {
namespace {

constexpr int kBatch = 4;  // states that are loaded together

template <class A>
__global__ void __launch_bounds__(kThreads, 3)
    lincomb_kernel(const __grid_constant__ LincombArgs args, bool same, bool aligned) {
    constexpr int V = kPerThread<A>;
    __shared__ A coef[kMaxStates];
    const int J = args.states.count;
    if (threadIdx.x < kMaxStates)
        coef[threadIdx.x] = threadIdx.x < J ? static_cast<A>(args.coef[threadIdx.x]) : 0;
    __syncthreads();
    const double scale = args.scaled != nullptr ? *args.scale : 0;

    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * V;
    for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; at < args.n;
         at += stride) {
        A sum[V] = {};
        for (int first = 0; first < J; first += kBatch)
            visit_states<A, kBatch, V>(args.states, first, same, at, args.n, aligned,
                                       [&](int j, const A(&state)[V]) {
#pragma unroll
                                           for (int k = 0; k < V; ++k)
                                               lincomb_term(coef[first + j], state[k], sum[k]);
                                       });
        store_as(args.dtype, args.out, at, args.n, aligned, sum);
        if (args.scaled == nullptr) continue;
        const auto second = [&]<class Wide>(Wide factor) {
            Wide scaled[V];
#pragma unroll
            for (int k = 0; k < V; ++k) scaled[k] = factor * static_cast<Wide>(sum[k]);
            store_as(args.scaled_dtype, args.scaled, at, args.n, aligned, scaled);
        };
        args.scaled_dtype == DType::f64 ? second(scale) : second(static_cast<A>(scale));
    }
}

}  // namespace

const char* lincomb_cuda(const LincombArgs& args, int device, void* stream) {
    if (args.n == 0) return nullptr;
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    const bool aligned = aligned16(args.states) && aligned16(args.out) && aligned16(args.scaled);
    visit_accumulator(args.dtype, [&]<class A>(A) {
        const unsigned blocks = blocks_for(args.n, kThreads * kPerThread<A>);
        lincomb_kernel<A><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            args, same_dtype(args.states), aligned);
    });
    return message(cudaGetLastError());
}

}  // namespace gas
