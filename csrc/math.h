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

// A two-state step, and the state before it as the rounded next one tells it. Both must be compiled without
// contraction: the way back repeats the way forth to the bit.
template <class V, class C>
GAS_HD V reversible_next(V previous, V current, V output, const C* coef) {
    return coef[0] * previous + coef[1] * current + coef[2] * output;
}
template <class V, class C>
GAS_HD V reversible_previous(V next, V current, V output, const C* coef, C inverse) {
    return (next - coef[1] * current - coef[2] * output) * inverse;
}

// The bits of a floating number as an integer that grows with the number; its own inverse. `sign` is the
// position of the sign in I, `magnitude` the mask of all the other bits.
template <class I, class M>
GAS_HD I ordered(I bits, int sign, M magnitude) {
    return bits ^ ((bits >> sign) & magnitude);
}

// A difference that fits a code stays, any other becomes the escape.
template <class I>
GAS_HD I residual_code(I difference, int escape) {
    return (difference <= escape) | (difference >= -escape) ? I{} + escape : difference;
}

}  // namespace gas
