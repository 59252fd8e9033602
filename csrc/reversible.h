// One step of a two-state reversible solver, and its way back, bit for bit: the state before is what the
// inverse of the rounded next state gives, plus a residual code.
//
//   step:     next = round(coef[0] previous + coef[1] current + coef[2] output),
//             code = ordered(previous) - ordered(round((next - coef[1] current - coef[2] output) / coef[0]))
//   inverse:  previous = unordered(ordered(round((next - ...) / coef[0])) + code)
//
// `ordered` numbers the floats of a type in their order, so a code counts units in the last place. Codes are
// int8; one outside -127..127 is written as kEscape, and whoever calls keeps the true value of that element.
// The step and the inverse must round alike: both files are compiled without contraction to fused
// multiply-add.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace gas {

inline constexpr int kEscape = -128;

struct ReversibleArgs {
    DType dtype;     // of the three states
    void* previous;  // read by the step, written by the inverse
    const void* current;
    DType output_dtype;
    const void* output;
    const double* coef;  // [3]
    void* next;          // written by the step, read by the inverse
    std::int8_t* code;   // likewise
    std::int64_t n;
    bool inverse;
};

void reversible_cpu(const ReversibleArgs& args, int threads);

// Returns nullptr, or the message of the failed launch.
const char* reversible_cuda(const ReversibleArgs& args, int device, void* stream);

}  // namespace gas
