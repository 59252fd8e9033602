// What every kernel needs: 16-byte packs, pointers passed by value, the device, the launch check.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtypes.h"

namespace gas {

inline constexpr int kThreads = 256;
inline constexpr int kWarp = 32;

// Kernel parameters may hold 4 KiB on every card; 64 pointers take 512 bytes and need no copy before the
// launch.
struct Pointers {
    const void* at[kMaxStates];
};
static_assert(sizeof(Pointers) <= 512);

inline Pointers by_value(const void* const* pointers, int count) {
    Pointers result{};
    for (int i = 0; i < count; ++i) result.at[i] = pointers[i];
    return result;
}

// V elements that move as one (or a few) vector accesses of up to 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
    T v[V];
};

template <class T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

inline bool aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// Load V elements at p[at]; past n: zeros. `aligned` is the same for all threads, so the branch costs
// nothing.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p, std::int64_t at, std::int64_t n, bool aligned) {
    if (aligned && at + V <= n) return *reinterpret_cast<const Pack<T, V>*>(p + at);
    Pack<T, V> pack{};
#pragma unroll
    for (int k = 0; k < V; ++k) {
        if (at + k < n) pack.v[k] = p[at + k];
    }
    return pack;
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, std::int64_t at, std::int64_t n, bool aligned,
                                      const Pack<T, V>& pack) {
    if (aligned && at + V <= n) {
        *reinterpret_cast<Pack<T, V>*>(p + at) = pack;
        return;
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
        if (at + k < n) p[at + k] = pack.v[k];
    }
}

// nullptr when all is well, else the driver's words.
inline const char* message(cudaError_t status) {
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace gas
