#include <algorithm>

#include "launch.cuh"
#include "lincomb.h"

namespace gas {
namespace {

constexpr std::int64_t kMaxBlocks = 2048;  // enough to fill any card; the rest is the grid-stride loop

template <class T, class Z>
__global__ void __launch_bounds__(kThreads)
    lincomb_kernel(const __grid_constant__ Pointers states, int J, const double* __restrict__ coef, T* out,
                   const double* __restrict__ scale, Z* scaled, std::int64_t n, bool aligned) {
    using A = Acc<T>;
    using Wide = std::conditional_t<std::is_same_v<Z, double>, double, A>;
    constexpr int V = kPack<T>;
    __shared__ A c[kMaxStates];
    if (threadIdx.x < J) c[threadIdx.x] = static_cast<A>(coef[threadIdx.x]);
    __syncthreads();
    const Wide s = scaled != nullptr ? static_cast<Wide>(*scale) : Wide{};

    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * V;
    for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; at < n; at += stride) {
        A sum[V] = {};
#pragma unroll 4
        for (int j = 0; j < J; ++j) {
            const auto pack = load<V>(static_cast<const T*>(states.at[j]), at, n, aligned);
#pragma unroll
            for (int k = 0; k < V; ++k) lincomb_term(c[j], widen(pack.v[k]), sum[k]);
        }
        Pack<T, V> result;
#pragma unroll
        for (int k = 0; k < V; ++k) result.v[k] = narrow<T>(sum[k]);
        store<V>(out, at, n, aligned, result);
        if (scaled != nullptr) {
            Pack<Z, V> second;
#pragma unroll
            for (int k = 0; k < V; ++k) second.v[k] = narrow<Z>(s * static_cast<Wide>(widen(result.v[k])));
            store<V>(scaled, at, n, aligned, second);
        }
    }
}

template <class T, class Z>
cudaError_t launch(const LincombArgs& args, cudaStream_t stream) {
    bool aligned = aligned16(args.out) && aligned16(args.scaled);
    for (int j = 0; j < args.J; ++j) aligned = aligned && aligned16(args.states[j]);
    const std::int64_t tile = kThreads * kPack<T>;
    const auto blocks = static_cast<unsigned>(std::min((args.n + tile - 1) / tile, kMaxBlocks));
    lincomb_kernel<T, Z><<<blocks, kThreads, 0, stream>>>(by_value(args.states, args.J), args.J, args.coef,
                                                          static_cast<T*>(args.out), args.scale,
                                                          static_cast<Z*>(args.scaled), args.n, aligned);
    return cudaGetLastError();
}

}  // namespace

const char* lincomb_cuda(const LincombArgs& args, int device, void* stream) {
    if (args.n == 0) return nullptr;
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return message(status);
    visit(args.dtype, [&](auto t) {
        using T = decltype(t);
        if (args.scaled == nullptr) {
            status = launch<T, T>(args, static_cast<cudaStream_t>(stream));
            return;
        }
        visit(args.scaled_dtype,
              [&](auto z) { status = launch<T, decltype(z)>(args, static_cast<cudaStream_t>(stream)); });
    });
    return message(status);
}

}  // namespace gas
