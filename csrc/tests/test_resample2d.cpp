// Resampling against its definition in double: all factors, taps, paddings and layouts, with guard words.
#include <cmath>
#include <cstring>
#include <vector>

#include "../resample2d.h"
#include "check.h"

using namespace gas;

namespace {

constexpr float kGuard = 12345.0f;
constexpr double kTaps[kMaxTaps] = {0.4, 1.0, 3.0, 2.5, -0.5, 0.7, 0.1, 0.3};

// One output's terms along one axis: y[o] = sum_k taps[k] x[i], up i = o down + k - pad.
struct Term {
    double tap;
    std::int64_t at;
};

std::vector<Term> terms(const Resample2dArgs& a, std::int64_t o, std::int64_t size) {
    std::vector<Term> found;
    for (int k = 0; k < a.count; ++k) {
        const std::int64_t z = o * a.down + k - a.pad;
        if (z >= 0 && z % a.up == 0 && z / a.up < size) found.push_back({a.taps[k], z / a.up});
    }
    return found;
}

void check(Resample2dArgs args) {
    const std::int64_t inner = args.inner, image = args.height * args.width * inner;
    const std::int64_t out = args.planes * args.out_height * args.out_width * inner;
    std::vector<float> x(args.planes * image), y(out + 1, kGuard), again(out + 1, kGuard);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>((i * 7919) % 1009) / 1009 - 0.5f;
    args.x = x.data(), args.y = y.data();
    resample2d_cpu(args, 1);
    const float* at = y.data();
    for (std::int64_t plane = 0; plane < args.planes; ++plane) {
        for (std::int64_t h = 0; h < args.out_height; ++h) {
            for (std::int64_t w = 0; w < args.out_width; ++w) {
                for (std::int64_t c = 0; c < inner; ++c, ++at) {
                    double sum = 0;
                    for (const Term& v : terms(args, h, args.height)) {
                        for (const Term& u : terms(args, w, args.width))
                            sum += v.tap * u.tap * x[plane * image + (v.at * args.width + u.at) * inner + c];
                    }
                    CHECK(std::abs(*at - sum) < 1e-5);
                }
            }
        }
    }
    CHECK(y[out] == kGuard);
    args.y = again.data();
    resample2d_cpu(args, 3);
    CHECK(std::memcmp(y.data(), again.data(), sizeof(float) * y.size()) == 0);
}

}  // namespace

void test_resample2d() {
    struct Shape {
        std::int64_t planes, height, width, inner;
    };
    // Few planes are filtered by rows, many small ones transposed, the last ones by pixels.
    for (const Shape& s : {Shape{1, 1, 1, 1}, Shape{2, 5, 7, 1}, Shape{1, 129, 3, 1}, Shape{3, 33, 70, 1},
                           Shape{37, 4, 4, 1}, Shape{50, 8, 8, 1}, Shape{40, 3, 1, 1}, Shape{2, 5, 7, 3},
                           Shape{1, 8, 8, 64}, Shape{1, 9, 600, 129}}) {
        for (int count = 1; count <= kMaxTaps; ++count) {
            if (s.width == 600 && count != 4) continue;
            for (int up : {1, 2}) {
                for (int down : {1, 2}) {
                    const int pad = count > 4 ? count / 2 : (count - 1) / 2;
                    Resample2dArgs args{DType::f32, nullptr,  nullptr,  kTaps,   count, up, down,
                                        pad,        s.planes, s.height, s.width, 0,     0,  s.inner};
                    args.out_height = (s.height * up + down - 1) / down;
                    args.out_width = (s.width * up + down - 1) / down;
                    check(args);
                    args.out_height = (args.out_height + 1) / 2,
                    args.out_width += 3;  // any size may be asked for
                    check(args);
                }
            }
        }
    }
}
