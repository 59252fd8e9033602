// The leaky ReLU and its bits against loops in double: planes of all sizes, guard words, any number of
// threads.
#include <cmath>
#include <cstring>
#include <vector>

#include "../bias_leaky_relu.h"
#include "../bits.h"
#include "check.h"

using namespace gas;

namespace {

double number(std::uint64_t& seed) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(seed >> 11) / 9007199254740992.0 - 0.5;
}

constexpr std::uint8_t kGuardByte = 0xa5;

template <class A>
void check(DType dtype, std::int64_t batch, std::int64_t channels, std::int64_t inner) {
    const A guard = A(12345), slope = A(0.25);
    const std::int64_t n = batch * channels * inner, bytes = (n + 7) / 8;
    std::uint64_t seed = 7 + n;
    std::vector<A> x(n), bias(channels), y(n + 1, guard), again(n + 1, guard), dx(n + 1, guard);
    std::vector<A> dbias(channels + 1, guard), dbias2(channels + 1, guard);
    std::vector<std::uint8_t> bits(bytes + 1, kGuardByte), bits2(bytes + 1, kGuardByte);
    for (A& v : x) v = static_cast<A>(number(seed));
    for (A& v : bias) v = static_cast<A>(number(seed));
    if (n > 2) x[0] = A(NAN), x[1] = -bias[1 / inner % channels];  // a NaN, and a sum of zero
    const auto channel = [&](std::int64_t i) { return i / inner % channels; };

    BiasLeakyReluArgs args{dtype, x.data(), bias.data(), slope, y.data(), bits.data(),
                           true,  nullptr,  nullptr,     n,     channels, inner};
    bias_leaky_relu_cpu(args, 1);
    for (std::int64_t i = 0; i < n; ++i) {
        const A v = x[i] + bias[channel(i)];
        const bool positive = v > 0;
        CHECK(std::isnan(v) ? std::isnan(y[i]) : y[i] == (positive ? v : slope * v));
        CHECK((bits[i / 8] >> (i % 8) & 1) == positive);
    }
    CHECK(y[n] == guard && bits[bytes] == kGuardByte);
    if (n % 8 != 0) CHECK(bits[bytes - 1] >> (n % 8) == 0);
    args.y = again.data(), args.bits = bits2.data();
    bias_leaky_relu_cpu(args, 3);
    CHECK(std::memcmp(y.data(), again.data(), sizeof(A) * y.size()) == 0 && bits == bits2);
    args.bits = nullptr;
    bias_leaky_relu_cpu(args, 2);
    CHECK(std::memcmp(y.data(), again.data(), sizeof(A) * y.size()) == 0);

    // Masked, with and without a bias.
    if (n > 2) x[0] = x[1] = A(0.125);
    args.packs = false, args.bits = bits.data();
    for (const void* with : {static_cast<const void*>(bias.data()), static_cast<const void*>(nullptr)}) {
        args.bias = with;
        bias_leaky_relu_cpu(args, 2);
        for (std::int64_t i = 0; i < n; ++i) {
            const A v = with == nullptr ? x[i] : x[i] + bias[channel(i)];
            CHECK(again[i] == ((bits[i / 8] >> (i % 8) & 1) ? v : slope * v));
        }
        CHECK(again[n] == guard && bits == bits2);
    }

    args.y = dx.data(), args.dbias = dbias.data();
    bias_leaky_relu_cpu(args, 1);
    CHECK(std::memcmp(dx.data(), again.data(), sizeof(A) * dx.size()) == 0);
    std::vector<double> sums(channels);
    for (std::int64_t i = 0; i < n; ++i) sums[channel(i)] += static_cast<double>(again[i]);
    for (std::int64_t c = 0; c < channels; ++c)
        CHECK(std::abs(dbias[c] - sums[c]) < 1e-6 * (10 + std::abs(sums[c])));
    CHECK(dbias[channels] == guard && dx[n] == guard);
    args.dbias = dbias2.data();
    bias_leaky_relu_cpu(args, 3);
    CHECK(std::memcmp(dbias.data(), dbias2.data(), sizeof(A) * dbias.size()) == 0);
}

template <class A, int W>
void check_bits() {
    for (unsigned pattern : {0u, 1u, 0x5a5au, 0xffffu, 0x8001u}) {
        const std::uint64_t wanted = pattern & ((std::uint64_t{1} << W) - 1);
        Vec<A, W> v;
        for (int k = 0; k < W; ++k) v[k] = (pattern >> k & 1) ? A(1e-30) : (k % 3 == 0 ? A(NAN) : A(-0.0));
        CHECK((positive_bits<A, W>(v)) == wanted);
        const auto mask = spread<A, W>(wanted | 0xabcd0000u << 8);
        for (int k = 0; k < W; ++k) CHECK((mask[k] != 0) == ((pattern >> k & 1) != 0));
    }
}

}  // namespace

void test_bias_leaky_relu() {
    check_bits<float, kLanes<float>>();
    check_bits<double, kLanes<double>>();
    check_bits<float, 4>();
    for (std::int64_t inner : {1, 3, 16, 63, 64, 65, 129, 5000}) {
        for (std::int64_t channels : {1, 3, 8, 100}) {
            check<float>(DType::f32, 3, channels, inner);
            check<double>(DType::f64, 1, channels, inner);
        }
    }
    check<float>(DType::f32, 1134, 129, 1);
    check<float>(DType::f32, 9001, 64, 1);
    check<float>(DType::f32, 2, 384, 4096);  // large enough to be streamed
    std::vector<std::uint8_t> bits(12);
    for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint8_t>(37 * i + 11);
    for (std::int64_t at = 0; at < 96; ++at) {
        const std::uint64_t word = load_bits(bits.data(), 12, at);
        for (int k = 0; k < 64; ++k) {
            const bool wanted = at + k < 96 && (bits[(at + k) / 8] >> ((at + k) % 8) & 1);
            CHECK((word >> k & 1) == wanted);
        }
    }
}
