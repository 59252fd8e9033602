// Gated linear units against loops in double: halves of one tensor and two tensors, guard words behind both
// outputs.
#include <cmath>
#include <vector>

#include "../glu.h"
#include "check.h"

using namespace gas;

namespace {

constexpr float kGuard = 12345.0f;

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

void check_glu(Act act, double (*function)(double), std::int64_t rows, std::int64_t width, int threads) {
    const std::int64_t stride = 2 * width;
    std::vector<float> x(rows * stride), grad(rows * width), out(rows * width + 1, kGuard),
        d_x(rows * stride + 1, kGuard);
    for (std::size_t k = 0; k < x.size(); ++k) x[k] = static_cast<float>(std::sin(0.37 * k) * 4);
    for (std::size_t k = 0; k < grad.size(); ++k) grad[k] = static_cast<float>(std::cos(0.7 * k));
    GluArgs args{DType::f32, act,     x.data() + width, x.data(), stride, stride, nullptr,
                 out.data(), nullptr, nullptr,          stride,   stride, rows,   width};
    glu_cpu(args, threads);
    args.grad = grad.data();
    args.d_gate = d_x.data() + width, args.d_value = d_x.data();
    glu_cpu(args, threads);
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t k = 0; k < width; ++k) {
            const double value = x[row * stride + k], gate = x[row * stride + width + k];
            const double slope = (function(gate + 1e-5) - function(gate - 1e-5)) / 2e-5;
            const double g = grad[row * width + k];
            CHECK(std::abs(out[row * width + k] - value * function(gate)) < 4e-6);
            CHECK(std::abs(d_x[row * stride + k] - g * function(gate)) < 2e-6);
            CHECK(std::abs(d_x[row * stride + width + k] - g * value * slope) < 4e-6);
        }
    }
    CHECK(out[rows * width] == kGuard && d_x[rows * stride] == kGuard);
}

}  // namespace

void test_glu() {
    for (const std::int64_t width : {1, 3, 129, 1134, 5000}) {
        for (const std::int64_t rows : {1, 3, 17}) {
            check_glu(Act::silu, silu, rows, width, 1);
            check_glu(Act::gelu, gelu, rows, width, 2);
        }
    }
}
