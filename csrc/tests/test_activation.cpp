// The activations against long double, over sweeps that reach both tails and the extremes.
#include <cmath>
#include <limits>

#include "../activation.h"
#include "check.h"

using namespace gas;

namespace {

using Wide = long double;
constexpr Wide kRoot2 = 1.41421356237309504880168872420969808L;
constexpr Wide kDensity = 0.398942280401432677939946059934381868L;

Wide phi(Wide x) { return kDensity * std::exp(-x * x / 2); }
Wide cdf(Wide x) { return std::erfc(-x / kRoot2) / 2; }
Wide s(Wide x) { return 1 / (1 + std::exp(-x)); }
Wide argument(Wide x) { return 2 * kDensity * 2 * (x + 0.044715L * x * x * x); }  // sqrt(2/pi) = 2 phi(0)

Wide exact(Act act, Wide x) {
    return act == Act::silu ? x * s(x) : act == Act::gelu ? x * cdf(x) : x * s(argument(x));
}

Wide exact_slope(Act act, Wide x) {
    if (act == Act::silu) return s(x) * (1 + x * s(-x));
    if (act == Act::gelu) return cdf(x) + x * phi(x);
    const Wide u = argument(x);
    return s(u) * (1 + x * s(-u) * 4 * kDensity * (1 + 3 * 0.044715L * x * x));
}

// |got - want| in units of `eps` |want|, nothing below the smallest normal number counting.
template <class A>
Wide relative(A got, Wide want, Wide absolute = 0) {
    const Wide size = std::abs(want) + absolute + std::numeric_limits<A>::min();
    return std::abs(got - want) / (size * std::numeric_limits<A>::epsilon());
}

template <class A, int W>
void sweep(Wide exp_ulp, Wide gelu_ulp, Wide silu_ulp) {
    using V = Vec<A, W>;
    Wide worst[8]{};
    const auto take = [&](int at, Wide error) {
        if (!(error <= worst[at])) worst[at] = error;  // a NaN is kept
    };
    const A range = sizeof(A) == 4 ? 87 : 700;
    for (int i = -40000; i <= 40000; ++i) {
        const A x = range * static_cast<A>(i) / 40000;
        const V v = V{} + x;
        take(0, relative(decay(v)[W - 1], std::exp(-Wide{x})));
        for (Act act : {Act::silu, Act::gelu, Act::gelu_tanh}) {
            V value, slope;
            // The tails in relative terms; gelu_tanh's exponent is rounded, so it is judged in absolute ones.
            const A z = act == Act::silu ? x : x * A(12.8) / range;  // Phi(-12.9) is subnormal
            activate_both(act, V{} + z, value, slope);
            const int at = static_cast<int>(act);
            take(at, relative(value[0], exact(act, z), act == Act::gelu_tanh ? 1 : 0));
            take(3 + at, relative(slope[0], exact_slope(act, z), 1));
            CHECK(value[0] == activate(act, V{} + z)[1] && slope[0] == activate_slope(act, V{} + z)[2]);
            if constexpr (W == 4) CHECK(value[0] == activate(act, z) && slope[0] == activate_slope(act, z));
        }
    }
    CHECK(worst[0] < exp_ulp);
    CHECK(worst[1] < silu_ulp && worst[2] < gelu_ulp && worst[3] < 3);
    CHECK(worst[4] < 3 && worst[5] < 3 && worst[6] < 3);
}

template <class A>
void extremes() {
    constexpr A inf = std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
    constexpr A max = std::numeric_limits<A>::max(), tiny = std::numeric_limits<A>::denorm_min();
    CHECK(decay(A(0)) == 1 && decay(A(-0.0)) == 1 && decay(tiny) == 1);
    CHECK(decay(-inf) == inf && decay(inf) == 0 && decay(max) == 0 && decay(-max) == inf);
    for (Act act : {Act::none, Act::silu, Act::gelu, Act::gelu_tanh}) {
        CHECK(activate(act, A(0)) == 0 && activate_slope(act, A(0)) == (act == Act::none ? A(1) : A(0.5)));
        CHECK(std::isnan(activate(act, nan)) && (act == Act::none || std::isnan(activate_slope(act, nan))));
        CHECK(activate(act, max) == max && activate(act, inf) == inf);
        CHECK(activate_slope(act, max) == 1);
        CHECK(std::abs(activate(act, tiny)) <= tiny && std::abs(activate(act, -tiny)) <= tiny);
        if (act == Act::none) continue;
        CHECK(activate(act, -max) == 0);
        CHECK(activate_slope(act, -max) == 0);
    }
}

}  // namespace

void test_activation() {
    sweep<float, 4>(1.5, 4, 3);
    sweep<float, kLanes<float>>(1.5, 4, 3);
    sweep<double, 4>(1.5, 200, 3);  // erfc of a rounded argument
    extremes<float>();
    extremes<double>();
    // Where e^-a leaves the normal numbers it is zero, and nothing else, for every a beyond.
    for (float a = 86; a < 2000; a += 0.01f) {
        const Wide want = std::exp(-Wide{a});
        CHECK(std::abs(decay(a) - want) <= 2e-38L && (a < 87 || decay(a) < 2e-38f));
    }
}
