#include "glu.h"
#include "launch.cuh"

namespace gas {
namespace {

// Doubles go one by one: their functions take all the registers.
template <class T>
inline constexpr int kGluPack = sizeof(T) == 8 ? 1 : kPack<T>;

// One pack of one row at a time; `small` when 32 bits hold every index of a pack.
template <class T>
__global__ void __launch_bounds__(kThreads)
    glu_kernel(const __grid_constant__ GluArgs args, std::int64_t per_row, bool small, bool aligned) {
    using A = Acc<T>;
    constexpr int V = kGluPack<T>;
    const std::int64_t packs = args.rows * per_row, stride = std::int64_t{gridDim.x} * kThreads;
    for (std::int64_t pack = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; pack < packs;
         pack += stride) {
        // A 64-bit division costs as much as the memory access it finds.
        const std::int64_t row =
            small ? static_cast<std::uint32_t>(pack) / static_cast<std::uint32_t>(per_row) : pack / per_row;
        const std::int64_t at = (pack - row * per_row) * V;
        const auto in = [&](const void* p, std::int64_t row_stride) {
            return load<V>(static_cast<const T*>(p) + row * row_stride, at, args.width, aligned);
        };
        const auto out = [&](void* p, std::int64_t row_stride, const Pack<T, V>& values) {
            store<V>(static_cast<T*>(p) + row * row_stride, at, args.width, aligned, values);
        };
        const auto gate = in(args.gate, args.gate_stride), value = in(args.value, args.value_stride);
        if (args.grad == nullptr) {
            Pack<T, V> result;
#pragma unroll
            for (int k = 0; k < V; ++k)
                result.v[k] = narrow<T>(static_cast<A>(widen(value.v[k])) *
                                        activate(args.act, static_cast<A>(widen(gate.v[k]))));
            out(args.out, args.width, result);
            continue;
        }
        const auto grad = in(args.grad, args.width);
        Pack<T, V> d_gate, d_value;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            A y, slope;
            activate_both(args.act, static_cast<A>(widen(gate.v[k])), y, slope);
            const A g = widen(grad.v[k]);
            d_value.v[k] = narrow<T>(g * y);
            d_gate.v[k] = narrow<T>(g * static_cast<A>(widen(value.v[k])) * slope);
        }
        out(args.d_gate, args.d_gate_stride, d_gate);
        out(args.d_value, args.d_value_stride, d_value);
    }
}

}  // namespace

const char* glu_cuda(const GluArgs& args, int device, void* stream) {
    if (args.rows == 0 || args.width == 0) return nullptr;
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    visit(args.dtype, [&]<class T>(T) {
        constexpr int V = kGluPack<T>;
        const bool aligned = aligned16(args.gate) && aligned16(args.value) && aligned16(args.grad) &&
                             aligned16(args.out) && aligned16(args.d_gate) && aligned16(args.d_value) &&
                             (args.rows == 1 || (args.width % V == 0 && args.gate_stride % V == 0 &&
                                                 args.value_stride % V == 0 && args.d_gate_stride % V == 0 &&
                                                 args.d_value_stride % V == 0));
        const std::int64_t per_row = (args.width + V - 1) / V;
        const bool small = args.rows * per_row < (std::int64_t{1} << 31);
        const unsigned blocks = blocks_for(args.rows * per_row, kThreads);
        glu_kernel<T>
            <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, per_row, small, aligned);
    });
    return message(cudaGetLastError());
}

}  // namespace gas
