// One column of the solver's adjoint in one pass over x, f and the J later cotangents g[i], n elements each:
//   mu = sum_i b[i] g[i],  g_x = sum_i a[i] g[i],  da[i] = <g[i], x>,  db[i] = <g[i], f>.
// With `f` null only da is computed (f, a, b, mu, g_x, db are not touched): J inner products.
//
// The products are summed in two stages of a shape that only n decides: same bits for any number of threads,
// no atomics.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace gas {

struct AdjointArgs {
    DType dtype;
    const void* x;
    const void* f;
    const void* const* g;  // J host-side pointers
    int J;
    const double* a;
    const double* b;
    void* mu;
    void* g_x;
    double* da;
    double* db;
    double* workspace;  // adjoint_workspace(n, products, cuda) doubles
    std::int64_t n;
};

// First-stage blocks of the device path: fixed, so that the same sums come out of every card.
inline constexpr int kReductionBlocks = 1024;

// Doubles of scratch for `products` sums (2J, or J with f null).
std::int64_t adjoint_workspace(std::int64_t n, int products, bool cuda);

void adjoint_cpu(const AdjointArgs& args, int threads);

// Returns nullptr, or the message of the failed launch.
const char* adjoint_cuda(const AdjointArgs& args, int device, void* stream);

}  // namespace gas
