// y = v if v > 0 else slope v, with v = x + bias[c]; and what its derivatives of any order are made of.
//
// The signs are all that is kept: one bit per element, bit k of byte i for element 8 i + k in memory order,
// ceil(n / 8) bytes, unused bits zero. With m = 1 where the bit is set, else slope, three calls are a closed
// set: each is the derivative of another one.
//
//   packs             y = leaky(x + bias[c]), and the bits are written (bits null: only y)
//   not packs         y = m (x + bias[c]), with the bits as they stand
//   dbias not null    y = m x (bias null), and dbias[c] = sum of m x over all elements of the channel
//
// x, y: n elements of `dtype`. bias, dbias [channels]: float, or double where dtype is double. Element i
// belongs to channel (i / inner) % channels: inner = H W for NCHW, 1 for channels_last and for rank 2.
// dbias is summed in short float runs, and those in double, in a shape that only the sizes decide: same bits
// for any number of threads.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace gas {

struct BiasLeakyReluArgs {
    DType dtype;
    const void* x;
    const void* bias;  // or null
    double slope;
    void* y;
    std::uint8_t* bits;
    bool packs;
    void* dbias;        // or null
    double* workspace;  // on a device kBiasSplits doubles per channel, for dbias
    std::int64_t n;
    std::int64_t channels;
    std::int64_t inner;
};

// First-stage sums per channel, at most, of the device path.
inline constexpr int kBiasSplits = 256;

void bias_leaky_relu_cpu(const BiasLeakyReluArgs& args, int threads);

// Returns nullptr, or the message of the failed launch.
const char* bias_leaky_relu_cuda(const BiasLeakyReluArgs& args, int device, void* stream);

// V is a value or a vector, M the comparison's result. A NaN is not positive, and slope * NaN is a NaN.
template <class V, class M>
GAS_HD V leaky(V v, V slope, M positive) {
    return positive ? v : slope * v;
}

}  // namespace gas
