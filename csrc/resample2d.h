// Separable FIR resampling of H x W images: per axis
//   y[o] = sum_k taps[k] z[o down + k - pad],  z[i up] = x[i], z = 0 elsewhere and outside of the image.
//
// up and down are 1 or 2. With the taps reversed, pad' = count - 1 - pad, up and down exchanged and the sizes
// exchanged, the same call is the transpose: the op is its own derivative.
//
// x: `planes` images of height x width pixels of `inner` values each (NCHW: planes B C, inner 1;
// channels_last: planes B, inner C), y likewise with out_height x out_width. Sums run in float, in double for
// double: down the columns first, then along the rows.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace gas {

inline constexpr int kMaxTaps = 8;

struct Resample2dArgs {
    DType dtype;
    const void* x;
    void* y;
    const double* taps;  // on the host, for the device path too
    int count;           // 1..8
    int up;
    int down;
    int pad;
    std::int64_t planes;
    std::int64_t height;
    std::int64_t width;
    std::int64_t out_height;
    std::int64_t out_width;
    std::int64_t inner;
};

void resample2d_cpu(const Resample2dArgs& args, int threads);

// Returns nullptr, or the message of the failed launch.
const char* resample2d_cuda(const Resample2dArgs& args, int device, void* stream);

// The sum without the zeros that `up` puts in: outputs come in `phases` of one or two, each with its own
// taps,
//   y[phases q + s] = sum_{j < count[s]} taps[s][j] x[step q + first[s] + j].
template <class A>
struct Phases {
    int phases;
    int step;
    int first[2];
    int count[2];
    A taps[2][kMaxTaps];
};

template <class A>
Phases<A> phases_of(const Resample2dArgs& args) {
    Phases<A> f{};
    f.phases = args.up == 2 && args.down == 1 ? 2 : 1;
    f.step = args.down == 2 && args.up == 1 ? 2 : 1;
    for (int s = 0; s < f.phases; ++s) {
        // Only every up-th tap meets a value of x: those with s + k - pad = up i.
        int k = args.up == 2 ? (args.pad + s) % 2 : 0;
        f.first[s] = (s + k - args.pad) / args.up;
        for (; k < args.count; k += args.up) f.taps[s][f.count[s]++] = static_cast<A>(args.taps[k]);
    }
    return f;
}

}  // namespace gas
