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
    const unsigned blocks =
        blocks_for(args.planes * strips * args.out_width * (args.inner / V), kThreads, std::int64_t{1} << 16);
    resample2d_kernel<T, V>
        <<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(args.x), static_cast<T*>(args.y), f, im);
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
