// One column of the solver's adjoint in one pass over x, f and the J later cotangents g[i], n elements each:
//   mu = sum_i b[i] g[i],  g_x = sum_i a[i] g[i],  da[i] = <g[i], x>,  db[i] = <g[i], f>.
// mu is stored like f, g_x like x; g_x may be x itself, which is then overwritten. Each tensor has its own
// dtype; sums run in double where x or f is double, else in float.
// With `f` null only da is computed (f, a, b, mu, g_x, db are not touched): J inner products.
//
// The products are summed in two stages of a shape that only n decides: same bits for any number of threads,
// no atomics.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace gas {

struct AdjointArgs {
    DType x_dtype;
    const void* x;
    DType f_dtype;
    const void* f;
    States g;
    const double* a;
    const double* b;
    void* mu;
    void* g_x;
    double* da;
    double* db;
    double* workspace;  // on a device kReductionBlocks doubles for each product (2J, or J with f null)
    std::int64_t n;
};

// First-stage blocks of the device path: fixed, so that the same sums come out of every card.
inline constexpr int kReductionBlocks = 1024;

void adjoint_cpu(const AdjointArgs& args, int threads);

// Returns nullptr, or the message of the failed launch.
const char* adjoint_cuda(const AdjointArgs& args, int device, void* stream);

}  // namespace gas
