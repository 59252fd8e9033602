#include "launch.cuh"
#include "reversible.h"

namespace gas {
namespace {

template <class T>
using Lane = std::conditional_t<std::is_same_v<T, double>, long long, int>;

template <class T>
__device__ __forceinline__ Lane<T> ordered_of(T value) {
    Lane<T> bits;
    if constexpr (sizeof(T) == 8)
        bits = __double_as_longlong(value);
    else if constexpr (sizeof(T) == 4)
        bits = __float_as_int(value);
    else
        bits = static_cast<short>(value.bits);
    return ordered(bits, 8 * sizeof(Lane<T>) - 1, static_cast<Lane<T>>((1ull << (8 * sizeof(T) - 1)) - 1));
}

template <class T>
__device__ __forceinline__ T unordered(Lane<T> order) {
    const Lane<T> bits =
        ordered(order, 8 * sizeof(Lane<T>) - 1, static_cast<Lane<T>>((1ull << (8 * sizeof(T) - 1)) - 1));
    if constexpr (sizeof(T) == 8)
        return __longlong_as_double(bits);
    else if constexpr (sizeof(T) == 4)
        return __int_as_float(bits);
    else
        return {static_cast<std::uint16_t>(bits)};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    reversible_kernel(const __grid_constant__ ReversibleArgs args, bool aligned) {
    using A = Acc<T>;
    using Unsigned = std::make_unsigned_t<Lane<T>>;
    constexpr int V = kPerThread<A>;
    const A coef[3] = {static_cast<A>(args.coef[0]), static_cast<A>(args.coef[1]),
                       static_cast<A>(args.coef[2])};
    const A inverse = 1 / coef[0];
    const std::int64_t stride = std::int64_t{gridDim.x} * kThreads * V;
    for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; at < args.n;
         at += stride) {
        A current[V], output[V];
        load_as(args.dtype, args.current, at, args.n, aligned, current);
        load_as(args.output_dtype, args.output, at, args.n, aligned, output);
        T* const previous_at = static_cast<T*>(args.previous);
        T* const next_at = static_cast<T*>(args.next);
        Pack<T, V> previous, next;
        Pack<std::int8_t, V> code;
        if (args.inverse) {
            next = load<V>(next_at, at, args.n, aligned);
            code = load<V>(args.code, at, args.n, aligned);
        } else {
            previous = load<V>(previous_at, at, args.n, aligned);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) {
            if (!args.inverse) {
                const A sum =
                    reversible_next(static_cast<A>(widen(previous.v[k])), current[k], output[k], coef);
                next.v[k] = narrow<T>(sum);
            }
            const A back =
                reversible_previous(static_cast<A>(widen(next.v[k])), current[k], output[k], coef, inverse);
            const auto guess = static_cast<Unsigned>(ordered_of(narrow<T>(back)));
            if (args.inverse) {
                const auto truth = guess + static_cast<Unsigned>(static_cast<Lane<T>>(code.v[k]));
                previous.v[k] = unordered<T>(static_cast<Lane<T>>(truth));
            } else {
                const auto truth = static_cast<Unsigned>(ordered_of(previous.v[k]));
                code.v[k] =
                    static_cast<std::int8_t>(residual_code(static_cast<Lane<T>>(truth - guess), kEscape));
            }
        }
        if (args.inverse) {
            store<V>(previous_at, at, args.n, aligned, previous);
        } else {
            store<V>(next_at, at, args.n, aligned, next);
            store<V>(args.code, at, args.n, aligned, code);
        }
    }
}

}  // namespace

const char* reversible_cuda(const ReversibleArgs& args, int device, void* stream) {
    if (args.n == 0) return nullptr;
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    const bool aligned = aligned16(args.previous) && aligned16(args.current) && aligned16(args.output) &&
                         aligned16(args.next) && aligned16(args.code);
    visit(args.dtype, [&]<class T>(T) {
        const unsigned blocks = blocks_for(args.n, kThreads * kPerThread<Acc<T>>);
        reversible_kernel<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, aligned);
    });
    return message(cudaGetLastError());
}

}  // namespace gas
