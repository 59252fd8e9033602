// out = act(y), y = z (1 + scale) + shift, z = d rstd_g weight + bias, d = x - mean_g, and its gradients.
//
// B batch, C channels, G groups, N pixels; x, out and g are [B, C, N], or [B, N, C] with channels_last;
// weight, bias [C]; scale, shift [B, C], rows `stride` apart; mean, rstd [B, G] in float, or double for
// double.
//
// Folded: y = d (rstd gain) + offset, gain = weight (1 + scale), offset = bias (1 + scale) + shift. With
// dy = g act'(y), and S1 = sum dy, S2 = sum dy d over the pixels of a channel:
//   dshift = S1,  dscale = weight rstd S2 + bias S1,
//   dx = rstd (dy gain - m1 - d m2),  m1 = sum_c gain S1 / (N C/G),  m2 = rstd^2 sum_c gain S2 / (N C/G).
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtypes.h"

namespace gas {

// Forward and backward share it. Null: weight and scale as if 1 and 0, bias and shift 0; an output left out.
struct GroupNormArgs {
    DType dtype;
    const void* x;
    DType weight_dtype;
    const void* weight;
    DType bias_dtype;
    const void* bias;
    DType scale_dtype;  // of dscale as well
    const void* scale;
    std::int64_t scale_stride;
    DType shift_dtype;  // of dshift as well
    const void* shift;
    std::int64_t shift_stride;
    Act act;
    double eps;
    bool channels_last;
    std::int64_t B, C, G, N;
    // CUDA: partial sums run over `chunk` elements: of a group (forward), of a channel (backward), or over
    // `chunk` pixels (channels_last); `chunks` of them. The workspace holds two numbers for each partial
    // sum, and two more per group in the backward pass.
    std::int64_t chunk, chunks;
    void* workspace;
    void* mean;  // written by the forward pass (on the host null leaves both out), read by the backward pass
    void* rstd;
    void* out;  // dx in the backward pass
    // Elements from one sample of it, and of g, to the next: C N, but for the host's forward pass (out) and
    // backward pass (g) without channels_last, where samples may be parts of wider ones.
    std::int64_t out_stride;
    const void* g;  // from here on backward only
    std::int64_t g_stride;
    void* dscale;
    void* dshift;
};

void group_norm_silu_cpu(const GroupNormArgs& args, int threads);
void group_norm_silu_backward_cpu(const GroupNormArgs& args, int threads);

// Return nullptr, or the message of the failed launch. All pointers are device pointers.
const char* group_norm_silu_cuda(const GroupNormArgs& args, int device, void* stream);
const char* group_norm_silu_backward_cuda(const GroupNormArgs& args, int device, void* stream);

template <class A>
GAS_HD void fold(A weight, A bias, A scale, A shift, A& gain, A& offset) {
    gain = weight * (A(1) + scale);
    offset = bias * (A(1) + scale) + shift;
}

// What one element is normalised with: numbers, or vectors of them.
template <class V>
struct Affine {
    V mean, rstd, gain, offset;
};

template <class V>
GAS_HD V centred(const Affine<V>& affine, V x) {
    return x - affine.mean;
}

template <class V>
GAS_HD V modulated(const Affine<V>& affine, V d) {
    return d * (affine.rstd * affine.gain) + affine.offset;  // the product is the same for all of a loop
}

template <class V>
GAS_HD V norm_dx(const Affine<V>& affine, V d, V dy, V m1, V m2) {
    return affine.rstd * (dy * affine.gain - m1 - d * m2);
}

}  // namespace gas
