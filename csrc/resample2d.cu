#include "launch.cuh"
#include "resample2d.h"

namespace gas {
namespace {

constexpr int kRows = 4;  // outputs of a thread, one below the other: they share the sums along the rows

struct Image {
    std::int64_t planes, height, width, out_height, out_width, inner, strips;
    int low, high;  // rows of x that a strip reaches, from its first output's on
};

// A thread sums V values of kRows pixels. It goes down the rows of x: each is filtered along the row once,
// straight from the caches, and added to the outputs that it reaches. Neighbouring threads are neighbours in
// memory: values of a pixel first, then pixels of a row, then strips of rows and planes.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    resample2d_kernel(const T* __restrict__ x, T* __restrict__ y, const __grid_constant__ Phases<Acc<T>> f,
                      const __grid_constant__ Image im) {
    using A = Acc<T>;
    __shared__ A taps[2][kMaxTaps];
    if (threadIdx.x < 2 * kMaxTaps)
        taps[threadIdx.x / kMaxTaps][threadIdx.x % kMaxTaps] =
            f.taps[threadIdx.x / kMaxTaps][threadIdx.x % kMaxTaps];
    __syncthreads();

    const int mask = f.phases - 1;  // one phase or two: x & mask is the phase, x >> mask the place in it
    const std::int64_t groups = im.inner / V, strips = im.strips;
    const std::int64_t all = im.planes * strips * im.out_width * groups;
    for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all;
         i += std::int64_t{gridDim.x} * kThreads) {
        const std::int64_t pixel = i / groups;
        const std::int64_t strip = pixel / im.out_width, plane = strip / strips;
        const std::int64_t column = pixel - strip * im.out_width, value = (i - pixel * groups) * V;
        const std::int64_t top = (strip - plane * strips) * kRows;

        // Taps of this column that meet the image: from `skip` to `reach`.
        const int phase = static_cast<int>(column & mask);
        const std::int64_t left = (column >> mask) * f.step + f.first[phase];
        const int skip = static_cast<int>(max(-left, std::int64_t{0}));
        const int reach = static_cast<int>(min(std::int64_t{f.count[phase]}, im.width - left));
        // Rows of x that meet the strip, counted from the first output's, `base`.
        const std::int64_t base = (top >> mask) * f.step;
        const int begin = static_cast<int>(max(std::int64_t{im.low}, -base));
        const int end = static_cast<int>(min(std::int64_t{im.high}, im.height - base));

        A sum[kRows][V] = {};
        const T* row = x + ((plane * im.height + base + begin) * im.width + left) * im.inner + value;
        for (int h = begin; h < end; ++h, row += im.width * im.inner) {
            A along[V] = {};
            for (int j = skip; j < reach; ++j) {
                const auto pack = *reinterpret_cast<const Pack<T, V>*>(row + j * im.inner);
#pragma unroll
                for (int k = 0; k < V; ++k) along[k] += taps[phase][j] * widen(pack.v[k]);
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int s = r & mask, j = h - ((r >> mask) * f.step + f.first[s]);
                if (j < 0 || j >= f.count[s]) continue;
                const A tap = taps[s][j];
#pragma unroll
                for (int k = 0; k < V; ++k) sum[r][k] += tap * along[k];
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (top + r >= im.out_height) continue;
            Pack<T, V> pack;
#pragma unroll
            for (int k = 0; k < V; ++k) pack.v[k] = narrow<T>(sum[r][k]);
            const std::int64_t at = (plane * im.out_height + top + r) * im.out_width + column;
            put(y + at * im.inner + value, pack);
        }
    }
}

// The same for the filters that are used most: down by two (P = 1) with N taps, two or four; or up by two (P
// = 2) with two taps a phase, the second phase one row further on. A thread streams down a column: rows of x
// come two (or one) at a time, are filtered along once, and complete the outputs that end there.
constexpr int kStream = 8;  // outputs of a thread, one below the other

template <class T, int V, int P, int N>
__global__ void __launch_bounds__(kThreads, V > 1 ? 2 : 4)
    resample2d_stream(const T* __restrict__ x, T* __restrict__ y, const __grid_constant__ Phases<Acc<T>> f,
                      const __grid_constant__ Image im) {
    using A = Acc<T>;
    constexpr int kStep = P == 1 ? 2 : 1, kPairs = kStream / P + (P == 1 ? N / 2 - 1 : 2);
    // A 64-bit division costs as much as the memory access it finds: here 32 bits hold every index.
    const auto over = [](std::int64_t a, std::int64_t b) {
        return std::int64_t{static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b)};
    };
    const std::int64_t groups = im.inner / V, all = im.planes * im.strips * im.out_width * groups;
    for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all;
         i += std::int64_t{gridDim.x} * kThreads) {
        const std::int64_t pixel = over(i, groups), strip = over(pixel, im.out_width);
        const std::int64_t plane = over(strip, im.strips), value = (i - pixel * groups) * V;
        const int column = static_cast<int>(pixel - strip * im.out_width);
        const int top = static_cast<int>(strip - plane * im.strips) * kStream;
        const int phase = column % P, left = column / P * kStep + f.first[phase];
        const int base = top / P * kStep + f.first[0];
        A taps[N];
        bool inside[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
            taps[j] = P == 2 && phase == 1 ? f.taps[1][j] : f.taps[0][j];
            inside[j] = left + j >= 0 && left + j < im.width;
        }
        const std::int64_t pitch = im.width * im.inner;
        const T* from = x + ((plane * im.height + base) * im.width + left) * im.inner + value;
        T* const to = y + ((plane * im.out_height + top) * im.out_width + column) * im.inner + value;
        const auto emit = [&](int row, const A(&sum)[V]) {
            if (row < 0 || row >= kStream || top + row >= im.out_height) return;
            Pack<T, V> pack;
#pragma unroll
            for (int k = 0; k < V; ++k) pack.v[k] = narrow<T>(sum[k]);
            put(to + row * (im.out_width * im.inner), pack);
        };
        A before[V] = {};  // what is not complete yet (down), or the row before (up)
#pragma unroll 1
        for (int pair = 0; pair < kPairs; ++pair, from += kStep * pitch) {
            Pack<T, V> packs[kStep][N];
#pragma unroll
            for (int h = 0; h < kStep; ++h) {
                const int row = base + pair * kStep + h;
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    packs[h][j] = {};
                    if (row >= 0 && row < im.height && inside[j])
                        packs[h][j] = *reinterpret_cast<const Pack<T, V>*>(from + h * pitch + j * im.inner);
                }
            }
            A along[kStep][V] = {};
#pragma unroll
            for (int h = 0; h < kStep; ++h) {
#pragma unroll
                for (int j = 0; j < N; ++j) {
#pragma unroll
                    for (int k = 0; k < V; ++k)
                        along[h][k] += taps[j] * static_cast<A>(widen(packs[h][j].v[k]));
                }
            }
            A one[V], two[V];
#pragma unroll
            for (int k = 0; k < V; ++k) {
                if constexpr (P == 1) {
                    const A last = f.taps[0][N - 2] * along[0][k] + f.taps[0][N - 1] * along[1][k];
                    one[k] = before[k] + last;
                    if constexpr (N == 4) before[k] = f.taps[0][0] * along[0][k] + f.taps[0][1] * along[1][k];
                } else {
                    one[k] = f.taps[0][0] * before[k] + f.taps[0][1] * along[0][k];
                    two[k] = f.taps[1][0] * before[k] + f.taps[1][1] * along[0][k];
                    before[k] = along[0][k];
                }
            }
            if constexpr (P == 1) {
                emit(pair - (N / 2 - 1), one);
            } else {
                emit(2 * pair - 2, one);
                emit(2 * pair - 3, two);
            }
        }
    }
}

template <class T, int V>
void launch(const Resample2dArgs& args, cudaStream_t stream) {
    const Phases<Acc<T>> f = phases_of<Acc<T>>(args);
    const std::int64_t strips = (args.out_height + kRows - 1) / kRows;
    Image im{args.planes, args.height, args.width, args.out_height, args.out_width, args.inner, strips, 0, 0};
    for (int r = 0; r < kRows; ++r) {
        const int s = r % f.phases, first = r / f.phases * f.step + f.first[s];
        im.low = std::min(im.low, first);
        im.high = std::max(im.high, first + f.count[s]);
    }
    const auto run = [&](auto kernel) {
        const unsigned blocks = blocks_for(args.planes * im.strips * args.out_width * (args.inner / V),
                                           kThreads, std::int64_t{1} << 16);
        kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(args.x), static_cast<T*>(args.y), f,
                                                im);
    };
    const std::int64_t most = args.planes * std::max(args.out_height, args.height) *
                              std::max(args.out_width, args.width) * args.inner;
    const bool down = f.phases == 1 && f.step == 2 && (args.count == 4 || args.count == 2);
    const bool up = f.phases == 2 && args.count == 4 && f.first[1] == f.first[0] + 1;
    if (most >= std::int64_t{1} << 31 || !(down || up)) return run(resample2d_kernel<T, V>);
    im.strips = (args.out_height + kStream - 1) / kStream;
    if (up) return run(resample2d_stream<T, V, 2, 2>);
    args.count == 4 ? run(resample2d_stream<T, V, 1, 4>) : run(resample2d_stream<T, V, 1, 2>);
}

}  // namespace

const char* resample2d_cuda(const Resample2dArgs& args, int device, void* stream) {
    if (args.planes * args.out_height * args.out_width * args.inner == 0) return nullptr;
    const OnDevice here(device);
    if (here.status != cudaSuccess) return message(here.status);
    visit(args.dtype, [&]<class T>(T) {
        const auto queue = static_cast<cudaStream_t>(stream);
        const bool packs = args.inner % kPack<T> == 0 && aligned16(args.x) && aligned16(args.y);
        packs ? launch<T, kPack<T>>(args, queue) : launch<T, 1>(args, queue);
    });
    return message(cudaGetLastError());
}

}  // namespace gas
