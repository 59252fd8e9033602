// Gated linear units: out = value * act(gate), and their derivative from the same two inputs,
//   d_value = grad * act(gate),  d_gate = grad * value * act'(gate).
// gate and value are `rows` runs of `width` elements, `stride` apart: two tensors, or the halves of one.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtypes.h"

namespace gas {

struct GluArgs {
    DType dtype;
    Act act;
    const void* gate;
    const void* value;
    std::int64_t gate_stride, value_stride;
    const void* grad;  // null: forward; else [rows, width], dense
    void* out;         // forward: [rows, width], dense
    void* d_gate;      // backward
    void* d_value;
    std::int64_t d_gate_stride, d_value_stride;
    std::int64_t rows, width;
};

void glu_cpu(const GluArgs& args, int threads);

// Returns nullptr, or the message of the failed launch.
const char* glu_cuda(const GluArgs& args, int device, void* stream);

}  // namespace gas
