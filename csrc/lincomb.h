// out = sum_j coef[j] states[j] in one pass, and optionally scaled = scale * out in a second dtype.
//
// J states of n elements each, coef[J] and scale[1] in double. With `scaled` null the second output is left
// out. `scaled` is computed from the rounded `out`: scale * out, done later, gives the same bits.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace gas {

struct LincombArgs {
    States states;
    const double* coef;
    DType dtype;  // of out; sums run in double where it is double, else in float
    void* out;
    DType scaled_dtype;
    const double* scale;
    void* scaled;
    std::int64_t n;
};

void lincomb_cpu(const LincombArgs& args, int threads);

// Returns nullptr, or the message of the failed launch. coef, scale, out and scaled are device pointers.
const char* lincomb_cuda(const LincombArgs& args, int device, void* stream);

}  // namespace gas
