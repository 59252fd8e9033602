// Each formula once, for the host (scalars and SIMD vectors alike) and for the device.
//
// V is a value: float, double, or a vector of them. C is a coefficient: float or double.
#pragma once

#ifdef __CUDACC__
#define GAS_HD __host__ __device__ __forceinline__
#else
#define GAS_HD inline __attribute__((always_inline))
#endif

namespace gas {

// One term of x+ = sum_i coef[i] states[i].
template <class V, class C>
GAS_HD void lincomb_term(C coef, V state, V& sum) {
    sum += coef * state;
}

// One term of d[i] = <g[i], x>.
template <class V>
GAS_HD void dot_term(V g, V x, V& d) {
    d += g * x;
}

// One later cotangent g[i] in the discrete adjoint of x[n+1] = sum_j A[n,j] x[j] + B[n,j] F[j]:
//   mu += b[i] g[i],  g_x += a[i] g[i],  da[i] += <g[i], x>,  db[i] += <g[i], f>.
template <class V, class C>
GAS_HD void adjoint_term(V g, V x, V f, C a, C b, V& mu, V& g_x, V& da, V& db) {
    lincomb_term(b, g, mu);
    lincomb_term(a, g, g_x);
    dot_term(g, x, da);
    dot_term(g, f, db);
}

}  // namespace gas
