#include "adjoint.h"

#include <algorithm>
#include <vector>

#include "simd.h"

namespace gas {
namespace {

constexpr int kUnroll = 2;
constexpr std::int64_t kChunk = 4096;  // first stage: a chunk is summed in lanes of Acc<T>, chunks in double
constexpr std::int64_t kParallelFrom = 32768;

template <bool Full, bool Stream, bool Step, class A, class V>
GAS_HD void adjoint_block(const AdjointArgs& args, const A* a, const A* b, std::int64_t at, std::int64_t left,
                          V* da, V* db) {
    constexpr int W = kLanes<A>;
    V x[kUnroll], f[kUnroll], mu[kUnroll]{}, g_x[kUnroll]{};
    load_as<Full, A, W>(args.x_dtype, args.x, at, left, x);
    if constexpr (Step) load_as<Full, A, W>(args.f_dtype, args.f, at, left, f);
    for (int i = 0; i < args.g.count; ++i) {
        V g[kUnroll], dot_x = da[i], dot_f = db[i];
        load_as<Full, A, W>(args.g.dtype[i], args.g.at[i], at, left, g);
        for (int u = 0; u < kUnroll; ++u) {
            if constexpr (Step)
                adjoint_term(g[u], x[u], f[u], a[i], b[i], mu[u], g_x[u], dot_x, dot_f);
            else
                dot_term(g[u], x[u], dot_x);
        }
        da[i] = dot_x;
        if constexpr (Step) db[i] = dot_f;
    }
    if constexpr (Step) {
        for (int u = 0; u < kUnroll; ++u) {
            store_as<Full, Stream, A>(args.f_dtype, args.mu, at + u * W, mu[u], left - u * W);
            store_as<Full, Stream, A>(args.x_dtype, args.g_x, at + u * W, g_x[u], left - u * W);
        }
    }
}

template <class V>
double sum_lanes(V v) {
    double sum = 0;
    for (unsigned lane = 0; lane < sizeof(V) / sizeof(v[0]); ++lane) sum += static_cast<double>(v[lane]);
    return sum;
}

template <bool Stream, bool Step, class A>
void adjoint(const AdjointArgs& args, int threads) {
    using V = Vec<A, kLanes<A>>;
    constexpr std::int64_t kBlock = kLanes<A> * kUnroll;
    const int J = args.g.count, products = Step ? 2 * J : J;
    A a[kMaxStates]{}, b[kMaxStates]{};
    if constexpr (Step) {
        std::copy_n(args.a, J, a);
        std::copy_n(args.b, J, b);
    }
    const std::int64_t chunks = (args.n + kChunk - 1) / kChunk;
    std::vector<double> partial(chunks * products);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.n >= kParallelFrom)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        V da[kMaxStates], db[kMaxStates];
        for (int i = 0; i < J; ++i) da[i] = db[i] = V{};
        const std::int64_t end = std::min((chunk + 1) * kChunk, args.n);
        std::int64_t at = chunk * kChunk;
        for (; at + kBlock <= end; at += kBlock)
            adjoint_block<true, Stream, Step>(args, a, b, at, kBlock, da, db);
        if (at < end) adjoint_block<false, Stream, Step>(args, a, b, at, end - at, da, db);
        if constexpr (Stream) stream_fence();
        double* sums = partial.data() + chunk * products;
        for (int i = 0; i < J; ++i) {
            sums[i] = sum_lanes(da[i]);
            if constexpr (Step) sums[J + i] = sum_lanes(db[i]);
        }
    }
    double total[2 * kMaxStates]{};
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int i = 0; i < products; ++i) total[i] += partial[chunk * products + i];
    }
    std::copy_n(total, J, args.da);
    if constexpr (Step) std::copy_n(total + J, J, args.db);
}

}  // namespace

void adjoint_cpu(const AdjointArgs& args, int threads) {
    const bool step = args.f != nullptr;
    // Over x itself, the lines to write are in the cache already.
    const bool stream = step && args.g_x != args.x && streams(args.mu, args.n * bytes(args.f_dtype)) &&
                        streams(args.g_x, args.n * bytes(args.x_dtype));
    visit_accumulator(step ? wider(args.x_dtype, args.f_dtype) : args.x_dtype, [&]<class A>(A) {
        if (stream)
            adjoint<true, true, A>(args, threads);
        else
            step ? adjoint<false, true, A>(args, threads) : adjoint<false, false, A>(args, threads);
    });
}

}  // namespace gas
