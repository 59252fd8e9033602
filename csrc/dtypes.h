// The four storage types, the type that sums run in, and the way between them. No torch, no CUDA run-time
// needed.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "math.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gas {

enum class DType : std::uint8_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr int bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};

// Sums run in float, or in double for double.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline constexpr int kMaxStates = 64;

// Up to 64 tensors of n elements each, every one in its own dtype. Small enough to be a kernel parameter,
// so nothing is copied before a launch.
struct States {
    const void* at[kMaxStates];
    DType dtype[kMaxStates];
    int count;
};
static_assert(sizeof(States) <= 1024);

// Call body(T{}) with the storage type that `dtype` names.
template <class Body>
void visit(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::f32:
            return body(float{});
        case DType::f64:
            return body(double{});
        case DType::bf16:
            return body(bf16{});
        case DType::f16:
            return body(f16{});
    }
    throw std::invalid_argument("unknown dtype code");
}

// Where two dtypes meet, only double decides what sums run in.
constexpr DType wider(DType a, DType b) { return a == DType::f64 ? a : b; }

// Call body(A{}) with the type that sums run in when results are stored as `dtype`.
template <class Body>
void visit_accumulator(DType dtype, Body&& body) {
    dtype == DType::f64 ? body(double{}) : body(float{});
}

#ifdef __CUDACC__
// Device only: the hardware's conversions, round to nearest even.
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __uint_as_float(std::uint32_t{v.bits} << 16); }
__device__ __forceinline__ float widen(f16 v) { return __half2float(__ushort_as_half(v.bits)); }

template <class T, class A>
__device__ __forceinline__ T narrow(A v) {
    if constexpr (std::is_same_v<T, bf16>) {
        return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(v)))};
    } else if constexpr (std::is_same_v<T, f16>) {
        return {__half_as_ushort(__float2half_rn(static_cast<float>(v)))};
    } else {
        return static_cast<T>(v);
    }
}
#endif

}  // namespace gas
