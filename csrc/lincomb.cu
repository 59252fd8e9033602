#include "launch.cuh"
#include "lincomb.h"

namespace gas {
namespace {

constexpr int kBatch = 4;  // states that are loaded together
// Blocks of a multiprocessor: registers enough for what is on the way; elsewhere three would spill a few.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 2;
#endif

template <class A, bool Narrow>
__global__ void __launch_bounds__(kThreads, kBlocks)
    lincomb_kernel(const __grid_constant__ LincombArgs args, bool same, bool aligned) {
    // As many bytes of 16-bit states are on the way as of float.
    constexpr int V = Narrow ? 2 * kPerThread<A> : kPerThread<A>;
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
#pragma unroll 1
        for (int first = 0; first < J; first += kBatch)
            visit_states<A, Narrow, kBatch, V>(args.states, first, same, at, args.n, aligned,
                                               [&](int j, const A(&state)[V]) {
#pragma unroll
                                                   for (int k = 0; k < V; ++k)
                                                       lincomb_term(coef[first + j], state[k], sum[k]);
                                               });
        store_as<Narrow>(args.dtype, args.out, at, args.n, aligned, sum);
        if (args.scaled == nullptr) continue;
        const auto second = [&]<class Wide>(Wide factor) {
            Wide scaled[V];
#pragma unroll
            for (int k = 0; k < V; ++k) scaled[k] = factor * static_cast<Wide>(sum[k]);
            store_as<Narrow>(args.scaled_dtype, args.scaled, at, args.n, aligned, scaled);
        };
        if constexpr (!Narrow) {
            if (args.scaled_dtype == DType::f64) {
                second(scale);
                continue;
            }
        }
        second(static_cast<A>(scale));
    }
}

}  // namespace

const char* lincomb_cuda(const LincombArgs& args, int device, void* stream) {
    if (args.n == 0) return nullptr;
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    const bool aligned = aligned16(args.states) && aligned16(args.out) && aligned16(args.scaled);
    const bool same = same_dtype(args.states);
    const bool narrow = same && narrow_dtype(args.states.dtype[0]) && narrow_dtype(args.dtype) &&
                        (args.scaled == nullptr || narrow_dtype(args.scaled_dtype));
    visit_accumulator(args.dtype, [&]<class A>(A) {
        const unsigned blocks = blocks_for(args.n, kThreads * kPerThread<A> * (narrow ? 2 : 1));
        const auto kernel = narrow ? lincomb_kernel<float, true> : lincomb_kernel<A, false>;
        kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, same, aligned);
    });
    return message(cudaGetLastError());
}

}  // namespace gas
