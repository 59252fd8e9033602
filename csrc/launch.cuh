// What every kernel needs: 16-byte packs, loads of any storage type, the grid, the launch check.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "dtypes.h"

namespace gas {

inline constexpr int kThreads = 256;
inline constexpr int kWarp = 32;

// V elements that move as one (or a few) vector accesses of up to 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
    T v[V];
};

// One access for every 16 bytes: left to itself, the compiler stores some packs element by element.
template <class T, int V>
__device__ __forceinline__ void put(void* p, const Pack<T, V>& pack) {
    if constexpr (alignof(Pack<T, V>) == 16) {
        struct Words {
            uint4 at[sizeof pack / 16];
        };
        const auto words = __builtin_bit_cast(Words, pack);
#pragma unroll
        for (int k = 0; k < static_cast<int>(sizeof pack / 16); ++k)
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(static_cast<uint4*>(p) + k),
                         "r"(words.at[k].x), "r"(words.at[k].y), "r"(words.at[k].z), "r"(words.at[k].w)
                         : "memory");
    } else {
        *static_cast<Pack<T, V>*>(p) = pack;
    }
}

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
        put(p + at, pack);
        return;
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
        if (at + k < n) p[at + k] = pack.v[k];
    }
}

constexpr bool narrow_dtype(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

// Elements a thread takes at a time where types are mixed: one 16-byte load of 16-bit elements, two of
// float, two of double.
template <class A>
inline constexpr int kPerThread = 32 / static_cast<int>(sizeof(A));

// Calls body(T{}) with the storage type; Narrow: one of 16 bits. The branch is the same for all threads.
template <bool Narrow, class Body>
__device__ __forceinline__ void visit_storage(DType dtype, Body&& body) {
    if constexpr (Narrow) {
        dtype == DType::bf16 ? body(bf16{}) : body(f16{});
    } else {
        switch (dtype) {
            case DType::f64:
                return body(double{});
            case DType::bf16:
                return body(bf16{});
            case DType::f16:
                return body(f16{});
            default:
                return body(float{});
        }
    }
}

// Load and store as above, for storage whose type is known at run time, as V values of A.
template <bool Narrow = false, class A, int V>
__device__ __forceinline__ void load_as(DType dtype, const void* p, std::int64_t at, std::int64_t n,
                                        bool aligned, A (&values)[V]) {
    visit_storage<Narrow>(dtype, [&]<class T>(T) {
        const auto pack = load<V>(static_cast<const T*>(p), at, n, aligned);
#pragma unroll
        for (int k = 0; k < V; ++k) values[k] = static_cast<A>(widen(pack.v[k]));
    });
}

// Leaves in `values` what a later load of the stored elements would give.
template <bool Narrow = false, class A, int V>
__device__ __forceinline__ void store_as(DType dtype, void* p, std::int64_t at, std::int64_t n, bool aligned,
                                         A (&values)[V]) {
    visit_storage<Narrow>(dtype, [&]<class T>(T) {
        Pack<T, V> pack;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            pack.v[k] = narrow<T>(values[k]);
            values[k] = static_cast<A>(widen(pack.v[k]));
        }
        store<V>(static_cast<T*>(p), at, n, aligned, pack);
    });
}

// Calls body(j, values) for B states from the first-th on, with V values of each; past the last there may be
// zeros. Where all share a dtype (`same`) there is one branch for B states, and their loads are on the way
// together.
template <class A, bool Narrow, int B, int V, class Body>
__device__ __forceinline__ void visit_states(const States& states, int first, bool same, std::int64_t at,
                                             std::int64_t n, bool aligned, Body&& body) {
    if (same && aligned && at + V <= n) {
        visit_storage<Narrow>(states.dtype[0], [&]<class T>(T) {
            Pack<T, V> packs[B];
#pragma unroll
            for (int b = 0; b < B; ++b) {
                packs[b] = {};
                if (first + b < states.count)
                    packs[b] = *reinterpret_cast<const Pack<T, V>*>(
                        static_cast<const T*>(states.at[first + b]) + at);
            }
#pragma unroll
            for (int b = 0; b < B; ++b) {  // a branch here would draw the load down to it
                A values[V];
#pragma unroll
                for (int k = 0; k < V; ++k) values[k] = static_cast<A>(widen(packs[b].v[k]));
                body(b, values);
            }
        });
        return;
    }
#pragma unroll
    for (int b = 0; b < B; ++b) {
        if (first + b >= states.count) break;
        A values[V];
        load_as<Narrow>(states.dtype[first + b], states.at[first + b], at, n, aligned, values);
        body(b, values);
    }
}

inline bool same_dtype(const States& states) {
    return std::all_of(states.dtype, states.dtype + states.count,
                       [&](DType d) { return d == states.dtype[0]; });
}

inline bool aligned16(const States& states) {
    for (int i = 0; i < states.count; ++i) {
        if (!aligned16(states.at[i])) return false;
    }
    return true;
}

// Enough blocks to fill any card; the rest is the grid-stride loop.
inline unsigned blocks_for(std::int64_t n, std::int64_t tile, std::int64_t most = 2048) {
    return static_cast<unsigned>(std::clamp<std::int64_t>((n + tile - 1) / tile, 1, most));
}

// Makes the device current for as long as it lives, and forgets what an earlier launch of somebody else left
// behind: the check after ours tells of ours alone.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        cudaGetLastError();
        status = cudaGetDevice(&before_);
        if (status != cudaSuccess || before_ == device) return;
        status = cudaSetDevice(device);
        moved_ = status == cudaSuccess;
    }
    ~OnDevice() {
        if (moved_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    cudaError_t status;

  private:
    int before_ = 0;
    bool moved_ = false;
};

// nullptr when all is well, else the driver's words.
inline const char* message(cudaError_t status) {
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace gas
