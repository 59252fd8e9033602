#include "lincomb.h"

#include <algorithm>

#include "simd.h"

namespace gas {
namespace {

constexpr int kUnroll = 4;             // vectors in flight: their sums stay in registers over all J states
constexpr std::int64_t kChunk = 8192;  // elements a thread takes at a time
constexpr std::int64_t kParallelFrom = 32768;  // below this, waking the threads costs more than the sum

template <bool Full, class T, class Z>
GAS_HD void combine_block(const LincombArgs& args, const Acc<T>* coef, std::int64_t at, std::int64_t left) {
    constexpr int W = kLanes<T>;
    using A = Acc<T>;
    using Wide = std::conditional_t<std::is_same_v<Z, double>, double, A>;
    Vec<A, W> sum[kUnroll]{};
    for (int j = 0; j < args.J; ++j) {
        const T* state = static_cast<const T*>(args.states[j]) + at;
        for (int u = 0; u < kUnroll; ++u)
            lincomb_term(coef[j], load<Full>(state + u * W, left - u * W), sum[u]);
    }
    T* out = static_cast<T*>(args.out) + at;
    for (int u = 0; u < kUnroll; ++u) store_lanes<Full, T, Vec<A, W>, W>(out + u * W, sum[u], left - u * W);
    if (args.scaled == nullptr) return;
    Z* scaled = static_cast<Z*>(args.scaled) + at;
    const Wide scale = static_cast<Wide>(*args.scale);
    for (int u = 0; u < kUnroll; ++u) {
        // Read back what was stored, so that a narrow `out` is scaled as it stands.
        const auto stored = __builtin_convertvector(load<Full>(out + u * W, left - u * W), Vec<Wide, W>);
        store_lanes<Full, Z, Vec<Wide, W>, W>(scaled + u * W, scale * stored, left - u * W);
    }
}

template <class T, class Z>
void combine(const LincombArgs& args, int threads) {
    constexpr std::int64_t kBlock = kLanes<T> * kUnroll;
    Acc<T> coef[kMaxStates];
    std::copy_n(args.coef, args.J, coef);
    const std::int64_t chunks = (args.n + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.n >= kParallelFrom)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t end = std::min((chunk + 1) * kChunk, args.n);
        std::int64_t at = chunk * kChunk;
        for (; at + kBlock <= end; at += kBlock) combine_block<true, T, Z>(args, coef, at, kBlock);
        if (at < end) combine_block<false, T, Z>(args, coef, at, end - at);
    }
}

}  // namespace

void lincomb_cpu(const LincombArgs& args, int threads) {
    visit(args.dtype, [&](auto t) {
        using T = decltype(t);
        if (args.scaled == nullptr) return combine<T, T>(args, threads);
        visit(args.scaled_dtype, [&](auto z) { combine<T, decltype(z)>(args, threads); });
    });
}

}  // namespace gas
