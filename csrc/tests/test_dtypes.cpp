// The conversions, exhaustively over all 65,536 half-width bit patterns, for scalars and for whole vectors.
#include <cmath>
#include <cstdint>
#include <limits>

#include "../simd.h"
#include "check.h"

using namespace gas;

namespace {

// The value of an f16 bit pattern from its definition: (-1)^s 2^(e-15) (1 + m/1024), subnormal below e = 1.
double f16_by_definition(std::uint32_t h) {
    const double sign = h & 0x8000u ? -1 : 1;
    const int e = (h >> 10) & 31, m = h & 1023;
    if (e == 31)
        return m ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    return sign * (e ? std::ldexp(1 + m / 1024.0, e - 15) : std::ldexp(m / 1024.0, -14));
}

template <class T>
float through_vector(float value) {
    constexpr int W = kLanes<T>;
    Vec<float, W> v{};
    v[W - 1] = value;
    T stored[W];
    store_lanes<true, T, Vec<float, W>, W>(stored, v, W);
    return load<true>(stored, W)[W - 1];
}

}  // namespace

void test_dtypes() {
    for (std::uint32_t h = 0; h < 65536; ++h) {
        const float from16 = from_f16<float>(h), fromb = from_bf16<float>(h);
        const double exact = f16_by_definition(h);
        CHECK(std::isnan(exact) ? std::isnan(from16) : from16 == static_cast<float>(exact));
        // Every narrow number is its own nearest neighbour, sign of zero included; a NaN stays a NaN.
        if (std::isnan(from16))
            CHECK((to_f16<float, std::uint32_t>(from16) & 0x7fffu) > 0x7c00u);
        else
            CHECK((to_f16<float, std::uint32_t>(from16)) == h);
        if (std::isnan(fromb))
            CHECK((to_bf16<float, std::uint32_t>(fromb) & 0x7fffu) > 0x7f80u);
        else
            CHECK((to_bf16<float, std::uint32_t>(fromb)) == h);
        if (!std::isnan(from16)) CHECK(through_vector<f16>(from16) == from16);
        if (!std::isnan(fromb)) CHECK(through_vector<bf16>(fromb) == fromb);
    }
    // Halfway between neighbours goes to the even one; just above goes up. Over all finite positive
    // neighbours.
    for (std::uint32_t h = 0; h < 0x7bff; ++h) {
        const float low = from_f16<float>(h), high = from_f16<float>(h + 1), middle = 0.5f * (low + high);
        CHECK((to_f16<float, std::uint32_t>(middle)) == (h % 2 ? h + 1 : h));
        CHECK((to_f16<float, std::uint32_t>(std::nextafter(middle, high))) == h + 1);
        CHECK((to_f16<float, std::uint32_t>(std::nextafter(middle, low))) == h);
    }
    CHECK((to_f16<float, std::uint32_t>(65520.0f)) == 0x7c00u);
    CHECK((to_f16<float, std::uint32_t>(65519.0f)) == 0x7bffu);
    CHECK((to_bf16<float, std::uint32_t>(1.00390625f)) == 0x3f80u);  // halfway between 1 and its successor
    CHECK(std::isnan(through_vector<f16>(NAN)) && std::isnan(through_vector<bf16>(NAN)));
    CHECK(std::isinf(through_vector<f16>(1e30f)) && std::isinf(through_vector<bf16>(INFINITY)));
}
