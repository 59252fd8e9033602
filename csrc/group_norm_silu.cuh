// What the forward and the backward kernels share: which elements a thread takes, in both layouts.
#pragma once

#include "group_norm_silu.h"
#include "launch.cuh"

namespace gas {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kBlockWarps = kThreads / kWarp;

// Read one number of a small vector.
template <class A>
__device__ __forceinline__ A number_at(DType dtype, const void* p, std::int64_t at, A absent) {
    if (p == nullptr) return absent;
    A value[1];
    load_as(dtype, p, at, at + 1, false, value);
    return value[0];
}

template <class A>
__device__ __forceinline__ void store_number(DType dtype, void* p, std::int64_t at, A number) {
    A value[1] = {number};
    store_as(dtype, p, at, at + 1, false, value);
}

template <class A>
__device__ __forceinline__ Affine<A> affine_of(const GroupNormArgs& args, std::int64_t b, std::int64_t c,
                                               A mean, A rstd) {
    Affine<A> affine{mean, rstd, 0, 0};
    fold(number_at<A>(args.weight_dtype, args.weight, c, 1), number_at<A>(args.bias_dtype, args.bias, c, 0),
         number_at<A>(args.scale_dtype, args.scale, b * args.scale_stride + c, 0),
         number_at<A>(args.shift_dtype, args.shift, b * args.shift_stride + c, 0), affine.gain,
         affine.offset);
    return affine;
}

template <class A>
__device__ __forceinline__ Affine<A> affine_of(const GroupNormArgs& args, std::int64_t b, std::int64_t c) {
    const std::int64_t group = b * args.G + c / (args.C / args.G);
    return affine_of(args, b, c, static_cast<const A*>(args.mean)[group],
                     static_cast<const A*>(args.rstd)[group]);
}

// [B, C, N]: rows of `length` contiguous elements, in `chunks` pieces. `lanes` threads of one warp (a power
// of two) take a piece together. All threads of a warp go round the loop over pieces together.
struct Pieces {
    std::int64_t rows, length, chunk, chunks;
    int lanes;
    bool aligned;

    __device__ std::int64_t count() const { return rows * chunks; }
    __device__ std::int64_t first() const {
        return (std::int64_t{blockIdx.x} * kThreads + threadIdx.x / kWarp * kWarp) / lanes;
    }
    __device__ std::int64_t stride() const { return std::int64_t{gridDim.x} * (kThreads / lanes); }
    __device__ int lane() const { return threadIdx.x % lanes; }
    __device__ int mine() const { return threadIdx.x % kWarp / lanes; }  // which piece of the warp's
};

template <class A>
Pieces pieces_of(const GroupNormArgs& args, std::int64_t rows, std::int64_t length, bool aligned) {
    constexpr int V = kPerThread<A>;
    int lanes = 1;
    while (lanes < kWarp && lanes * V < length) lanes *= 2;
    return {rows, length, args.chunk, args.chunks, lanes, aligned && length % V == 0 && args.chunk % V == 0};
}

inline unsigned blocks_of(const Pieces& pieces) {
    return blocks_for(pieces.rows * pieces.chunks, kThreads / pieces.lanes, 1 << 16);
}

// [B, N, C]: a block takes `columns` packs of V channels of one sample, and `chunk` pixels; its threads are
// `columns` wide and kThreads / columns pixels deep.
struct Tiles {
    std::int64_t across, count;  // blocks over the channels; in all
    int columns;
    bool aligned;
};

template <class T>
Tiles tiles_of(const GroupNormArgs& args, bool aligned) {
    constexpr int V = kPack<T>;
    int columns = 1;
    while (columns < 64 && columns * V < args.C) columns *= 2;
    const std::int64_t across = (args.C + columns * V - 1) / (columns * V);
    return {across, across * args.B * args.chunks, columns, aligned && args.C % V == 0};
}

// Where a thread stands in tile `index`.
template <int V>
struct Place {
    // Its first channel, and the block's; its pixels are pixel, pixel + depth, ... < end.
    std::int64_t b, chunk, channel, first_channel, pixel, end;
    int column, row, depth;

    __device__ Place(const GroupNormArgs& args, const Tiles& tiles, std::int64_t index) {
        const std::int64_t over = index / tiles.across;
        b = over / args.chunks;
        chunk = over % args.chunks;
        column = threadIdx.x % tiles.columns;
        row = threadIdx.x / tiles.columns;
        depth = kThreads / tiles.columns;
        first_channel = index % tiles.across * tiles.columns * V;
        channel = first_channel + column * V;
        pixel = chunk * args.chunk + row;
        end = chunk * args.chunk + args.chunk;
        if (end > args.N) end = args.N;
        if (channel >= args.C) pixel = end;
    }

    // Calls body(offset, x, g) for its pixels, with V values of x, and of g if it is there. U pixels are on
    // the way before the first is used, and body may write over what they were read from.
    template <class T, bool Both, int U, class Body>
    __device__ __forceinline__ void for_pixels(const GroupNormArgs& args, bool aligned, Body&& body) const {
        using A = Acc<T>;
        const std::int64_t first = b * args.N * args.C;
        const T *const x = static_cast<const T*>(args.x) + first, *const g =
                                                                      static_cast<const T*>(args.g) + first;
        for (std::int64_t from = pixel; from < end; from += U * depth) {
            Pack<T, V> packs[2][U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                packs[0][u] = {}, packs[1][u] = {};
                const std::int64_t here = from + u * depth;
                if (here >= end) continue;
                packs[0][u] = load<V>(x, here * args.C + channel, (here + 1) * args.C, aligned);
                if constexpr (Both)
                    packs[1][u] = load<V>(g, here * args.C + channel, (here + 1) * args.C, aligned);
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (from + u * depth >= end) continue;
                A values[2][V];
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    values[0][k] = static_cast<A>(widen(packs[0][u].v[k]));
                    values[1][k] = static_cast<A>(widen(packs[1][u].v[k]));
                }
                body(first + (from + u * depth) * args.C, values[0], values[1]);
            }
        }
    }
};

template <class T, int V>
__device__ __forceinline__ void store_values(void* p, std::int64_t at, std::int64_t end, bool aligned,
                                             const Acc<T> (&values)[V]) {
    Pack<T, V> pack;
#pragma unroll
    for (int k = 0; k < V; ++k) pack.v[k] = narrow<T>(values[k]);
    store<V>(static_cast<T*>(p), at, end, aligned, pack);
}

template <class A, int V>
__device__ __forceinline__ void affines_of(const GroupNormArgs& args, std::int64_t b, std::int64_t channel,
                                           Affine<A> (&affine)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) affine[k] = affine_of<A>(args, b, min(channel + k, args.C - 1));
}

// Count, mean and sum of squared deviations of some numbers: joined without cancellation (Chan, Golub and
// LeVeque 1979).
template <class A>
struct Moments {
    A count, mean, squares;
};

template <class A>
__device__ __forceinline__ void join(Moments<A>& a, const Moments<A>& b) {
    const A count = a.count + b.count;
    if (b.count == 0) return;
    const A delta = b.mean - a.mean, part = b.count / count;
    a.mean += delta * part;
    a.squares += b.squares + delta * delta * a.count * part;
    a.count = count;
}

// The moments of `lanes` neighbouring threads, in the first of them. Counts up to 2^24 are exact in float,
// and a larger one is off by a rounding.
template <class A>
__device__ __forceinline__ void join_lanes(Moments<A>& m, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
        Moments<A> other = {__shfl_down_sync(kAllLanes, m.count, step),
                            __shfl_down_sync(kAllLanes, m.mean, step),
                            __shfl_down_sync(kAllLanes, m.squares, step)};
        join(m, other);  // lane 0 of the neighbours ends with the whole; what the others hold is not used
    }
}

template <class A>
__device__ __forceinline__ A rstd_of(const GroupNormArgs& args, const Moments<A>& m) {
    return A(1) / sqrt(m.squares / m.count + static_cast<A>(args.eps));
}

template <class A>
__device__ __forceinline__ void store_statistics(const GroupNormArgs& args, std::int64_t group,
                                                 const Moments<A>& m) {
    static_cast<A*>(args.mean)[group] = m.mean;
    static_cast<A*>(args.rstd)[group] = rstd_of(args, m);
}

template <bool Rough = false, class A>
__device__ __forceinline__ void slope_of(Act act, const Affine<A>& affine, A x, A g, A& d, A& dy) {
    d = centred(affine, x);
    dy = g * activate_slope<Rough>(act, modulated(affine, d));
}

// Sum over `lanes` neighbouring threads, in lane 0 of them, in a fixed order.
template <class A>
__device__ __forceinline__ A sum_lanes(A value, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
    return value;
}

// Stores the gradients of scale and shift of one channel, and returns its gain.
template <class A>
__device__ __forceinline__ A store_channel(const GroupNormArgs& args, std::int64_t b, std::int64_t c, A s1,
                                           A s2) {
    const A weight = number_at<A>(args.weight_dtype, args.weight, c, 1);
    const A bias = number_at<A>(args.bias_dtype, args.bias, c, 0);
    const Affine<A> affine = affine_of<A>(args, b, c);
    if (args.dshift != nullptr) store_number(args.shift_dtype, args.dshift, b * args.C + c, s1);
    if (args.dscale != nullptr)
        store_number(args.scale_dtype, args.dscale, b * args.C + c, weight * affine.rstd * s2 + bias * s1);
    return affine.gain;
}

// Takes groups whole where their sizes suit, in one launch for the whole pass; false where they do not.
bool group_norm_silu_whole(const GroupNormArgs& args, bool backward, cudaStream_t stream,
                           cudaError_t& status);

}  // namespace gas
