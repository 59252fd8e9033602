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
    load_as<A, 1>(dtype, p, at, at + 1, false, value);
    return value[0];
}

template <class A>
__device__ __forceinline__ void store_number(DType dtype, void* p, std::int64_t at, A number) {
    A value[1] = {number};
    store_as<A, 1>(dtype, p, at, at + 1, false, value);
}

template <class A>
__device__ __forceinline__ Affine<A> affine_of(const GroupNormArgs& args, std::int64_t b, std::int64_t c) {
    const std::int64_t group = b * args.G + c / (args.C / args.G);
    Affine<A> affine;
    affine.mean = static_cast<const A*>(args.mean)[group];
    affine.rstd = static_cast<const A*>(args.rstd)[group];
    fold(number_at<A>(args.weight_dtype, args.weight, c, 1), number_at<A>(args.bias_dtype, args.bias, c, 0),
         number_at<A>(args.scale_dtype, args.scale, b * args.scale_stride + c, 0),
         number_at<A>(args.shift_dtype, args.shift, b * args.shift_stride + c, 0), affine.gain,
         affine.offset);
    return affine;
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
template <class A>
inline constexpr int kChannelPack = 16 / static_cast<int>(sizeof(A));

struct Tiles {
    std::int64_t across, count;  // blocks over the channels; in all
    int columns;
    bool aligned;
};

template <class A>
Tiles tiles_of(const GroupNormArgs& args, bool aligned) {
    constexpr int V = kChannelPack<A>;
    int columns = 1;
    while (columns < 64 && columns * V < args.C) columns *= 2;
    const std::int64_t across = (args.C + columns * V - 1) / (columns * V);
    return {across, across * args.B * args.chunks, columns, aligned && args.C % V == 0};
}

// Where a thread stands in tile `index`.
template <int V>
struct Place {
    std::int64_t b, chunk, channel, pixel,
        end;  // its first channel; its pixels are pixel, pixel + depth, ... < end
    int column, row, depth;

    __device__ Place(const GroupNormArgs& args, const Tiles& tiles, std::int64_t index) {
        const std::int64_t over = index / tiles.across;
        b = over / args.chunks;
        chunk = over % args.chunks;
        column = threadIdx.x % tiles.columns;
        row = threadIdx.x / tiles.columns;
        depth = kThreads / tiles.columns;
        channel = (index % tiles.across * tiles.columns + column) * V;
        pixel = chunk * args.chunk + row;
        end = chunk * args.chunk + args.chunk;
        if (end > args.N) end = args.N;
        if (channel >= args.C) pixel = end;
    }
};

}  // namespace gas
