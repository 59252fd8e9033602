#include "adjoint.h"

#include <algorithm>

#include "simd.h"

namespace gas {
namespace {

constexpr int kUnroll = 4;
constexpr std::int64_t kChunk = 4096;  // first stage: a chunk is summed in lanes of Acc<T>, chunks in double
constexpr std::int64_t kParallelFrom = 32768;

std::int64_t chunks_of(std::int64_t n) { return (n + kChunk - 1) / kChunk; }

template <bool Full, bool Step, class T, class V>
GAS_HD void adjoint_block(const AdjointArgs& args, const Acc<T>* a, const Acc<T>* b, std::int64_t at,
                          std::int64_t left, V* da, V* db) {
    constexpr int W = kLanes<T>;
    V x[kUnroll], f[kUnroll], mu[kUnroll]{}, g_x[kUnroll]{};
    for (int u = 0; u < kUnroll; ++u) {
        x[u] = load<Full>(static_cast<const T*>(args.x) + at + u * W, left - u * W);
        if constexpr (Step) f[u] = load<Full>(static_cast<const T*>(args.f) + at + u * W, left - u * W);
    }
    for (int i = 0; i < args.J; ++i) {
        const T* g = static_cast<const T*>(args.g[i]) + at;
        V dot_x = da[i], dot_f = db[i];
        for (int u = 0; u < kUnroll; ++u) {
            const V g_u = load<Full>(g + u * W, left - u * W);
            if constexpr (Step)
                adjoint_term(g_u, x[u], f[u], a[i], b[i], mu[u], g_x[u], dot_x, dot_f);
            else
                dot_term(g_u, x[u], dot_x);
        }
        da[i] = dot_x;
        if constexpr (Step) db[i] = dot_f;
    }
    if constexpr (Step) {
        for (int u = 0; u < kUnroll; ++u) {
            store_lanes<Full, T, V, W>(static_cast<T*>(args.mu) + at + u * W, mu[u], left - u * W);
            store_lanes<Full, T, V, W>(static_cast<T*>(args.g_x) + at + u * W, g_x[u], left - u * W);
        }
    }
}

template <class T, class V>
double sum_lanes(V v) {
    double sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += static_cast<double>(v[lane]);
    return sum;
}

template <bool Step, class T>
void adjoint(const AdjointArgs& args, int threads) {
    using V = Vec<Acc<T>, kLanes<T>>;
    constexpr std::int64_t kBlock = kLanes<T> * kUnroll;
    const int J = args.J, products = Step ? 2 * J : J;
    Acc<T> a[kMaxStates]{}, b[kMaxStates]{};
    if constexpr (Step) {
        std::copy_n(args.a, J, a);
        std::copy_n(args.b, J, b);
    }
    const std::int64_t chunks = chunks_of(args.n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.n >= kParallelFrom)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        V da[kMaxStates], db[kMaxStates];
        for (int i = 0; i < J; ++i) da[i] = db[i] = V{};
        const std::int64_t end = std::min((chunk + 1) * kChunk, args.n);
        std::int64_t at = chunk * kChunk;
        for (; at + kBlock <= end; at += kBlock) adjoint_block<true, Step, T>(args, a, b, at, kBlock, da, db);
        if (at < end) adjoint_block<false, Step, T>(args, a, b, at, end - at, da, db);
        double* sums = args.workspace + chunk * products;
        for (int i = 0; i < J; ++i) {
            sums[i] = sum_lanes<T>(da[i]);
            if constexpr (Step) sums[J + i] = sum_lanes<T>(db[i]);
        }
    }
    double total[2 * kMaxStates]{};
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int i = 0; i < products; ++i) total[i] += args.workspace[chunk * products + i];
    }
    std::copy_n(total, J, args.da);
    if constexpr (Step) std::copy_n(total + J, J, args.db);
}

}  // namespace

std::int64_t adjoint_workspace(std::int64_t n, int products, bool cuda) {
    return products * (cuda ? kReductionBlocks : chunks_of(n));
}

void adjoint_cpu(const AdjointArgs& args, int threads) {
    visit(args.dtype, [&](auto t) {
        using T = decltype(t);
        args.f != nullptr ? adjoint<true, T>(args, threads) : adjoint<false, T>(args, threads);
    });
}

}  // namespace gas
