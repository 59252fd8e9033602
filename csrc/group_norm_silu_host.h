// What the forward and the backward pass on the host share: the small vectors, and the blocks of whole groups
// that a thread takes where channels are contiguous.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "group_norm_silu.h"
#include "simd.h"

namespace gas {

inline constexpr std::int64_t kRun = 4096;  // elements summed in float before the sum goes into a double
inline constexpr std::int64_t kGroupNormParallelFrom = 16384;  // elements that are worth waking the threads

template <class A>
GAS_HD A number_at(DType dtype, const void* p, std::int64_t at, A absent) {
    if (p == nullptr) return absent;
    return load_as<false, A, 2>(dtype, p, at, 1)[0];
}

template <class A>
void folded(const GroupNormArgs& args, std::int64_t b, std::int64_t c, A& gain, A& offset) {
    fold(number_at<A>(args.weight_dtype, args.weight, c, 1), number_at<A>(args.bias_dtype, args.bias, c, 0),
         number_at<A>(args.scale_dtype, args.scale, b * args.scale_stride + c, 0),
         number_at<A>(args.shift_dtype, args.shift, b * args.shift_stride + c, 0), gain, offset);
}

template <class A>
void store_channel_sums(const GroupNormArgs& args, std::int64_t b, std::int64_t c, A rstd, double s1,
                        double s2) {
    const auto store = [&](DType dtype, void* p, double value) {
        store_as<false, false, A, 2>(dtype, p, b * args.C + c, Vec<A, 2>{static_cast<A>(value)}, 1);
    };
    if (args.dshift != nullptr) store(args.shift_dtype, args.dshift, s1);
    if (args.dscale != nullptr)
        store(args.scale_dtype, args.dscale,
              number_at<double>(args.weight_dtype, args.weight, c, 1) * static_cast<double>(rstd) * s2 +
                  number_at<double>(args.bias_dtype, args.bias, c, 0) * s1);
}

// All lanes, added in pairs.
template <class V>
GAS_HD double lane_sum(V v) {
    if constexpr (kLanesOf<V> == 2) {
        return static_cast<double>(v[0]) + static_cast<double>(v[1]);
    } else {
        struct Halves {
            Vec<Element<V>, kLanesOf<V> / 2> low, high;
        };
        const auto halves = std::bit_cast<Halves>(v);
        return lane_sum(halves.low + halves.high);
    }
}

inline constexpr int kTile = 4;  // vectors that go through the arithmetic side by side

// Calls body with the activation, outside of all loops. It is a constant, so that their registers hold its
// numbers, but for double, where the library's exponentials are all the time.
template <class T, class Body>
void with_act(T, Act act, Body&& body) {
    if constexpr (std::is_same_v<T, double>)
        body(act);
    else
        with_act(act, body);
}

// U vectors y at once, first all exponentials: see activate_from. They are left in act(y), or in act'(y).
template <int U, class V>
GAS_HD void activate_all(Act act, V (&y)[U]) {
    V e[U], slope;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) e[u] = exponential(act, y[u]);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) activate_from(act, y[u], e[u], y[u], slope);
}

template <int U, class V>
GAS_HD void activate_slopes(Act act, V (&y)[U]) {
    V e[U], value;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) e[u] = exponential(act, y[u]);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) activate_from(act, y[u], e[u], value, y[u]);
}

// Channels [first, end) of one sample with channels_last: whole groups, and whole vectors but for the last.
template <class T>
struct Block {
    using A = Acc<T>;
    static constexpr int W = kLanes<T>;
    using V = Vec<A, W>;

    std::int64_t b, first, end;
    std::vector<A> mean, rstd, gain, offset;  // per channel, and room to load whole tiles

    Block(const GroupNormArgs& args, std::int64_t index) {
        const std::int64_t width = channels(args), blocks = count(args) / args.B;
        b = index / blocks;
        first = index % blocks * width;
        end = std::min(first + width, args.C);
        const auto room = static_cast<std::size_t>(end - first + kTile * W);
        mean.resize(room), rstd.resize(room), gain.resize(room), offset.resize(room);
        for (std::int64_t c = first; c < end; ++c) folded(args, b, c, gain[c - first], offset[c - first]);
    }

    static std::int64_t channels(const GroupNormArgs& args) {
        const std::int64_t in_group = args.C / args.G;
        const std::int64_t step = std::lcm<std::int64_t>(in_group, W), wanted = kTile * W;
        return std::min(args.C, (wanted + step - 1) / step * step);
    }
    static std::int64_t count(const GroupNormArgs& args) {
        return args.B * ((args.C + channels(args) - 1) / channels(args));
    }

    Affine<V> affine(std::int64_t c) const {
        const std::int64_t at = c - first;
        return {load<true>(&mean[at], W), load<true>(&rstd[at], W), load<true>(&gain[at], W),
                load<true>(&offset[at], W)};
    }

    // Calls body(full, c), full a constant, for each tile of kTile vectors; only the last may be short.
    template <class Body>
    void tiles(Body&& body) const {
        for (std::int64_t c = first; c < end; c += kTile * W)
            c + kTile* W <= end ? body(std::true_type{}, c) : body(std::false_type{}, c);
    }
};

}  // namespace gas
