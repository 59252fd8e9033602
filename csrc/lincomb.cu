#include "launch.cuh"
#include "lincomb.h"

namespace gas {
namespace {

template <class A>
__global__ void __launch_bounds__(kThreads)
    lincomb_kernel(const __grid_constant__ LincombArgs args, bool aligned) {
    constexpr int V = kPerThread<A>;
    __shared__ A coef[kMaxStates];
    const int J = args.states.count;
    if (threadIdx.x < J) coef[threadIdx.x] = static_cast<A>(args.coef[threadIdx.x]);
    __syncthreads();
    const double scale = args.scaled != nullptr ? *args.scale : 0;

    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * V;
    for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; at < args.n;
         at += stride) {
        A sum[V] = {};
#pragma unroll 4
        for (int j = 0; j < J; ++j) {
            A state[V];
            load_as(args.states.dtype[j], args.states.at[j], at, args.n, aligned, state);
#pragma unroll
            for (int k = 0; k < V; ++k) lincomb_term(coef[j], state[k], sum[k]);
        }
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
    const cudaError_t status = begin_on(device);
    if (status != cudaSuccess) return message(status);
    const bool aligned = aligned16(args.states) && aligned16(args.out) && aligned16(args.scaled);
    visit_accumulator(args.dtype, [&]<class A>(A) {
        const unsigned blocks = blocks_for(args.n, kThreads * kPerThread<A>);
        lincomb_kernel<A><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, aligned);
    });
    return message(cudaGetLastError());
}

}  // namespace gas
