#include "lincomb.h"

#include <algorithm>

#include "simd.h"

namespace gas {
namespace {

constexpr int kUnroll = 8;             // vectors in flight: their sums stay in registers over all J states
constexpr std::int64_t kChunk = 4096;  // elements a thread takes at a time
constexpr std::int64_t kParallelFrom = 32768;  // below this, waking the threads costs more than the sum

template <bool Full, bool Stream, class A>
GAS_HD void combine_block(const LincombArgs& args, const A* coef, std::int64_t at, std::int64_t left) {
    constexpr int W = kLanes<A>;
    Vec<A, W> sum[kUnroll]{};
    for (int j = 0; j < args.states.count; ++j) {
        Vec<A, W> state[kUnroll];
        load_as<Full, A, W>(args.states.dtype[j], args.states.at[j], at, left, state);
        for (int u = 0; u < kUnroll; ++u) lincomb_term(coef[j], state[u], sum[u]);
    }
    for (int u = 0; u < kUnroll; ++u)
        store_as<Full, Stream, A>(args.dtype, args.out, at + u * W, sum[u], left - u * W);
    if (Stream || args.scaled == nullptr) return;
    const auto second = [&]<class Wide>(Wide scale) {
        for (int u = 0; u < kUnroll; ++u) {
            const std::int64_t k = u * W;
            // Read back what was stored, so that a narrow `out` is scaled as it stands.
            const auto stored = load_as<Full, Wide, W>(args.dtype, args.out, at + k, left - k);
            store_as<Full, false, Wide, W>(args.scaled_dtype, args.scaled, at + k, scale * stored, left - k);
        }
    };
    args.scaled_dtype == DType::f64 ? second(*args.scale) : second(static_cast<A>(*args.scale));
}

template <bool Stream, class A>
void combine(const LincombArgs& args, int threads) {
    constexpr std::int64_t kBlock = kLanes<A> * kUnroll;
    A coef[kMaxStates];
    std::copy_n(args.coef, args.states.count, coef);
    const std::int64_t chunks = (args.n + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.n >= kParallelFrom)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t end = std::min((chunk + 1) * kChunk, args.n);
        std::int64_t at = chunk * kChunk;
        for (; at + kBlock <= end; at += kBlock) combine_block<true, Stream>(args, coef, at, kBlock);
        if (at < end) combine_block<false, Stream>(args, coef, at, end - at);
        if constexpr (Stream) stream_fence();
    }
}

}  // namespace

void lincomb_cpu(const LincombArgs& args, int threads) {
    // The second output is made from the first, read back: that one stays in the caches.
    const bool stream = args.scaled == nullptr && streams(args.out, args.n * bytes(args.dtype));
    visit_accumulator(args.dtype, [&]<class A>(A) {
        stream ? combine<true, A>(args, threads) : combine<false, A>(args, threads);
    });
}

}  // namespace gas
