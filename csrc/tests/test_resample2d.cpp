// Resampling against its definition in double: all factors, taps, paddings and layouts, in storage of three
// widths, with guard words.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../resample2d.h"
#include "../resample2d_window.h"
#include "check.h"

using namespace gas;

namespace {

constexpr double kTaps[kMaxTaps] = {0.4, 1.0, 3.0, 2.5, -0.5, 0.7, 0.1, 0.3};

template <class T>
T stored(double v) {
    if constexpr (std::is_same_v<T, bf16>)
        return {static_cast<std::uint16_t>(to_bf16<float, std::uint32_t>(static_cast<float>(v)))};
    else
        return static_cast<T>(v);
}

template <class T>
double value(T v) {
    if constexpr (std::is_same_v<T, bf16>)
        return from_bf16<float>(std::uint32_t{v.bits});
    else
        return v;
}

// What sums may be off by, and what storing them may add for each unit of the result.
template <class T>
constexpr double kSums = std::is_same_v<T, double> ? 1e-13 : 1e-5;
template <class T>
constexpr double kStorage = std::is_same_v<T, bf16> ? 0x1p-8 : 0;

// One output's terms along one axis: y[o] = sum_k taps[k] x[i], up i = o down + k - pad.
struct Term {
    double tap;
    std::int64_t at;
};

std::vector<std::vector<Term>> terms(const Resample2dArgs& a, std::int64_t outputs, std::int64_t size) {
    std::vector<std::vector<Term>> found(outputs);
    for (std::int64_t o = 0; o < outputs; ++o) {
        for (int k = 0; k < a.count; ++k) {
            const std::int64_t z = o * a.down + k - a.pad;
            if (z >= 0 && z % a.up == 0 && z / a.up < size) found[o].push_back({a.taps[k], z / a.up});
        }
    }
    return found;
}

template <class T>
void check(Resample2dArgs args) {
    const std::int64_t inner = args.inner, image = args.height * args.width * inner;
    const std::int64_t out = args.planes * args.out_height * args.out_width * inner;
    const T guard = stored<T>(12345);
    std::vector<T> x(args.planes * image), y(out + 1, guard), again(out + 1, guard);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = stored<T>((i * 7919) % 1009 / 1009.0 - 0.5);
    args.dtype = std::is_same_v<T, double> ? DType::f64 : std::is_same_v<T, bf16> ? DType::bf16 : DType::f32;
    args.x = x.data(), args.y = y.data();
    resample2d_cpu(args, 1);
    const auto down = terms(args, args.out_height, args.height),
               along = terms(args, args.out_width, args.width);
    const T* at = y.data();
    for (std::int64_t plane = 0; plane < args.planes; ++plane) {
        for (const auto& rows : down) {
            for (const auto& columns : along) {
                for (std::int64_t c = 0; c < inner; ++c, ++at) {
                    double sum = 0;
                    for (const Term& v : rows) {
                        for (const Term& u : columns)
                            sum += v.tap * u.tap *
                                   value(x[plane * image + (v.at * args.width + u.at) * inner + c]);
                    }
                    CHECK(std::abs(value(*at) - sum) < kSums<T> + kStorage<T> * std::abs(sum));
                }
            }
        }
    }
    CHECK(value(y[out]) == value(guard));
    args.y = again.data();
    resample2d_cpu(args, 3);
    CHECK(std::memcmp(y.data(), again.data(), sizeof(T) * y.size()) == 0);
}

void check_all(const Resample2dArgs& args) {
    check<float>(args);
    check<double>(args);
    check<bf16>(args);
}

// The ways that the frequent filters take, so that they are known to be among those checked.
int window(int count, int up, int down, int pad) {
    Resample2dArgs args{};
    args.taps = kTaps, args.count = count, args.up = up, args.down = down, args.pad = pad;
    return window_of(phases_of<float>(args));
}

}  // namespace

void test_resample2d() {
    CHECK(window(4, 1, 2, 1) == 1 && window(2, 1, 2, 0) == 2);
    CHECK(window(4, 2, 1, 2) == 3 && window(2, 2, 1, 1) == 4);
    struct Shape {
        std::int64_t planes, height, width, inner;
    };
    // Few planes are filtered by rows, many small ones transposed, the last ones by pixels.
    for (const Shape& s : {Shape{1, 1, 1, 1}, Shape{2, 5, 7, 1}, Shape{1, 129, 3, 1}, Shape{3, 33, 70, 1},
                           Shape{37, 4, 4, 1}, Shape{50, 8, 8, 1}, Shape{40, 3, 1, 1}, Shape{2, 5, 7, 3},
                           Shape{1, 8, 8, 64}, Shape{1, 9, 600, 129}}) {
        for (int count = 1; count <= kMaxTaps; ++count) {
            if (s.width == 600 && count != 4) continue;
            for (int pad = (count - 1) / 2; pad <= count / 2; ++pad) {  // of the way down, and of the way up
                for (int up : {1, 2}) {
                    for (int down : {1, 2}) {
                        Resample2dArgs args{DType::f32, nullptr,  nullptr,  kTaps,   count, up, down,
                                            pad,        s.planes, s.height, s.width, 0,     0,  s.inner};
                        args.out_height = (s.height * up + down - 1) / down;
                        args.out_width = (s.width * up + down - 1) / down;
                        check_all(args);
                        args.out_height = (args.out_height + 1) / 2,
                        args.out_width += 3;  // any size may be asked for
                        check_all(args);
                    }
                }
            }
        }
    }
}
