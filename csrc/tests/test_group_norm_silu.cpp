// group_norm_silu on the host against loops in double: odd sizes, both layouts, guard words behind every
// output, any number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../group_norm_silu.h"
#include "check.h"

using namespace gas;

namespace {

double number(std::uint64_t& seed) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(seed >> 11) / 9007199254740992.0 - 0.5;
}

constexpr float kGuard = 12345.0f;

struct Problem {
    std::int64_t B, C, G, N;
    bool last;
    Act act;
    std::vector<float> x, g, weight, bias, scale, shift;

    std::int64_t at(std::int64_t b, std::int64_t c, std::int64_t n) const {
        return last ? (b * N + n) * C + c : (b * C + c) * N + n;
    }
};

// out, dx [B C N], dscale and dshift [B C], in double.
struct Expected {
    std::vector<double> out, dx, dscale, dshift;

    explicit Expected(const Problem& p)
        : out(p.x.size()), dx(p.x.size()), dscale(p.scale.size()), dshift(p.scale.size()) {
        const std::int64_t channels = p.C / p.G, size = channels * p.N;
        std::vector<double> n(p.x.size()), dn(p.x.size());
        for (std::int64_t b = 0; b < p.B; ++b) {
            for (std::int64_t first = 0; first < p.C; first += channels) {
                const auto each = [&](auto&& body) {
                    for (std::int64_t c = first; c < first + channels; ++c)
                        for (std::int64_t i = 0; i < p.N; ++i) body(c, p.at(b, c, i));
                };
                double mean = 0, variance = 0, m1 = 0, m2 = 0;
                each([&](auto, auto i) { mean += p.x[i] / static_cast<double>(size); });
                each([&](auto, auto i) { variance += (p.x[i] - mean) * (p.x[i] - mean) / size; });
                const double rstd = 1 / std::sqrt(variance + 1e-5);
                each([&](auto c, auto i) {
                    n[i] = (p.x[i] - mean) * rstd;
                    const double z = n[i] * p.weight[c] + p.bias[c], factor = 1.0 + p.scale[b * p.C + c];
                    double slope;
                    activate_both(p.act, z * factor + p.shift[b * p.C + c], out[i], slope);
                    const double dy = p.g[i] * slope;
                    dshift[b * p.C + c] += dy;
                    dscale[b * p.C + c] += dy * z;
                    dn[i] = dy * factor * p.weight[c];
                    m1 += dn[i] / size, m2 += dn[i] * n[i] / size;
                });
                each([&](auto, auto i) { dx[i] = rstd * (dn[i] - m1 - n[i] * m2); });
            }
        }
    }
};

void check_near(const std::vector<float>& got, const std::vector<double>& want, double tolerance) {
    double worst = 0, size = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
        worst = std::fmax(worst, std::abs(got[i] - want[i]));
        size = std::fmax(size, std::abs(want[i]));
        CHECK(!std::isnan(got[i]));
    }
    CHECK(worst <= tolerance * size);
    CHECK(got[want.size()] == kGuard);
}

void check(std::int64_t B, std::int64_t C, std::int64_t G, std::int64_t N, bool last, Act act) {
    std::uint64_t seed = 7 + C + N;
    const auto draw = [&](std::int64_t n) {
        std::vector<float> v(n);
        for (float& e : v) e = static_cast<float>(4 * number(seed));
        return v;
    };
    const Problem p{B,       C,       G,           N,          last, act, draw(B * C * N), draw(B * C * N),
                    draw(C), draw(C), draw(B * C), draw(B * C)};
    const Expected want(p);
    std::vector<float> results[2][4];
    for (int threads = 1; threads <= 2; ++threads) {
        auto& [out, dx, dscale, dshift] = results[threads - 1];
        out.assign(B * C * N + 1, kGuard), dx = out;
        dscale.assign(B * C + 1, kGuard), dshift = dscale;
        std::vector<float> mean(B * G + 1, kGuard), rstd = mean;
        GroupNormArgs args{};
        args.x = p.x.data(), args.weight = p.weight.data(), args.bias = p.bias.data();
        args.scale = p.scale.data(), args.shift = p.shift.data(), args.scale_stride = args.shift_stride = C;
        args.act = act, args.eps = 1e-5, args.channels_last = last;
        args.B = B, args.C = C, args.G = G, args.N = N;
        args.mean = mean.data(), args.rstd = rstd.data(), args.out = out.data();
        args.out_stride = args.g_stride = C * N;
        group_norm_silu_cpu(args, threads);
        CHECK(mean[B * G] == kGuard && rstd[B * G] == kGuard);
        args.out = dx.data(), args.g = p.g.data(), args.dscale = dscale.data(), args.dshift = dshift.data();
        group_norm_silu_backward_cpu(args, threads);
        check_near(out, want.out, 2e-6);
        check_near(dx, want.dx, 1e-5);
        check_near(dscale, want.dscale, 1e-5);
        check_near(dshift, want.dshift, 1e-5);
        if (last) continue;
        // As the middle channels of wider samples: the same bits, and nothing beside them is written.
        const std::int64_t wide = (C + 3) * N, before = 2 * N;
        const auto middle = [&](const std::vector<float>& whole) {
            std::vector<float> cut;
            for (std::int64_t b = 0; b < B; ++b)
                cut.insert(cut.end(), &whole[b * wide + before], &whole[b * wide + before] + C * N);
            cut.push_back(kGuard);
            return cut;
        };
        std::vector<float> wide_out(B * wide, kGuard), wide_g = wide_out, again(B * C * N + 1, kGuard);
        for (std::int64_t b = 0; b < B; ++b) std::copy_n(&p.g[b * C * N], C * N, &wide_g[b * wide + before]);
        args.out_stride = args.g_stride = wide;
        args.out = &wide_out[before];
        group_norm_silu_cpu(args, threads);
        CHECK(middle(wide_out) == out);
        CHECK(std::count(wide_out.begin(), wide_out.end(), kGuard) >= 3 * N * B);
        args.out = again.data(), args.out_stride = C * N, args.g = &wide_g[before];
        group_norm_silu_backward_cpu(args, threads);
        CHECK(again == dx);
    }
    for (int i = 0; i < 4; ++i) CHECK(results[0][i] == results[1][i]);
}

}  // namespace

void test_group_norm_silu() {
    for (bool last : {false, true}) {
        for (Act act : {Act::none, Act::silu, Act::gelu, Act::gelu_tanh}) {
            check(2, 6, 3, 129, last, act);
            check(1, 3, 1, 3, last, act);
            check(2, 96, 6, 64, last, act);
            check(3, 70, 7, 9, last, act);
        }
        check(2, 64, 2, 1134, last, Act::silu);  // dy of a group does not fit what is kept of it
        check(1, 1134, 9, 2, last, Act::silu);
    }
}
