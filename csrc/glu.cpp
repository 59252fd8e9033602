#include "glu.h"

#include <algorithm>

#include "simd.h"

namespace gas {
namespace {

constexpr std::int64_t kChunk = 4096;
constexpr std::int64_t kParallelFrom = 8192;

// One run of `width` elements; the activation is known to the compiler.
template <Act act, bool Backward, class T>
void run(const T* gate, const T* value, const T* grad, T* out, T* d_gate, T* d_value, std::int64_t width) {
    constexpr int W = kLanes<T>;
    using V = Vec<Acc<T>, W>;
    const auto block = [&]<bool Full>(std::bool_constant<Full>, std::int64_t at, std::int64_t left) {
        const V x = load<Full>(gate + at, left), v = load<Full>(value + at, left);
        if constexpr (Backward) {
            const V g = load<Full>(grad + at, left);
            V y, slope;
            activate_both(act, x, y, slope);
            store_lanes<Full, T, V, W>(d_value + at, g * y, left);
            store_lanes<Full, T, V, W>(d_gate + at, g * v * slope, left);
        } else {
            store_lanes<Full, T, V, W>(out + at, v * activate(act, x), left);
        }
    };
    std::int64_t at = 0;
    for (; at + W <= width; at += W) block(std::true_type{}, at, W);
    if (at < width) block(std::false_type{}, at, width - at);
}

template <Act act, bool Backward, class T>
void glu(const GluArgs& args, int threads) {
    const std::int64_t per_row = (args.width + kChunk - 1) / kChunk, units = args.rows * per_row;
    const bool parallel = threads > 1 && args.rows * args.width >= kParallelFrom;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (std::int64_t unit = 0; unit < units; ++unit) {
        const std::int64_t row = unit / per_row, from = unit % per_row * kChunk;
        const auto in = [&](const void* p, std::int64_t stride) {
            return p == nullptr ? nullptr : static_cast<const T*>(p) + row * stride + from;
        };
        const auto to = [&](void* p, std::int64_t stride) { return const_cast<T*>(in(p, stride)); };
        run<act, Backward>(in(args.gate, args.gate_stride), in(args.value, args.value_stride),
                           in(args.grad, args.width), to(args.out, args.width),
                           to(args.d_gate, args.d_gate_stride), to(args.d_value, args.d_value_stride),
                           std::min(kChunk, args.width - from));
    }
}

}  // namespace

void glu_cpu(const GluArgs& args, int threads) {
    visit(args.dtype, [&]<class T>(T) {
        with_act(args.act, [&]<Act act>(Known<act>) {
            args.grad != nullptr ? glu<act, true, T>(args, threads) : glu<act, false, T>(args, threads);
        });
    });
}

}  // namespace gas
