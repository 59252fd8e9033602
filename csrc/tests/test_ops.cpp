// The host paths against loops in double: odd sizes, guard words behind every output, any number of threads.
#include <cmath>
#include <cstring>
#include <vector>

#include "../adjoint.h"
#include "../lincomb.h"
#include "check.h"

using namespace gas;

namespace {

// A small deterministic generator: the tests need numbers, not randomness.
double number(std::uint64_t& seed) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(seed >> 11) / 9007199254740992.0 - 0.5;
}

struct Problem {
    std::int64_t n;
    int J;
    std::vector<std::vector<float>> states;
    States pointers{};
    std::vector<float> x, f;
    std::vector<double> a, b;

    Problem(std::int64_t n, int J) : n(n), J(J) {
        std::uint64_t seed = 7 + n + J;
        auto vector = [&] {
            std::vector<float> v(n);
            for (float& e : v) e = static_cast<float>(number(seed));
            return v;
        };
        for (int j = 0; j < J; ++j) states.push_back(vector());
        for (const auto& s : states) pointers.at[pointers.count++] = s.data();
        x = vector(), f = vector();
        for (int j = 0; j < J; ++j) a.push_back(number(seed)), b.push_back(number(seed));
    }

    double combined(const std::vector<double>& coef, std::int64_t k) const {
        double sum = 0;
        for (int j = 0; j < J; ++j) sum += coef[j] * states[j][k];
        return sum;
    }
};

constexpr float kGuard = 12345.0f;

void check_lincomb(std::int64_t n, int J) {
    const Problem p(n, J);
    const double scale = 0.75;
    std::vector<float> out(n + 1, kGuard), scaled(n + 1, kGuard), again(n + 1, kGuard);
    LincombArgs args{p.pointers, p.a.data(), DType::f32, out.data(), DType::f32, &scale, scaled.data(), n};
    lincomb_cpu(args, 1);
    for (std::int64_t k = 0; k < n; ++k) {
        CHECK(std::abs(out[k] - p.combined(p.a, k)) < 4e-6);  // up to 64 float additions
        CHECK(scaled[k] == static_cast<float>(scale) * out[k]);
    }
    CHECK(out[n] == kGuard && scaled[n] == kGuard);
    args.out = again.data();
    args.scaled = nullptr;
    lincomb_cpu(args, 2);
    CHECK(std::memcmp(out.data(), again.data(), sizeof(float) * out.size()) == 0);
}

void check_adjoint(std::int64_t n, int J) {
    const Problem p(n, J);
    std::vector<float> mu(n + 1, kGuard), g_x(n + 1, kGuard);
    std::vector<double> da(J), db(J), da2(J), db2(J), dots(J);
    AdjointArgs args{DType::f32, p.x.data(), DType::f32, p.f.data(), p.pointers, p.a.data(), p.b.data(),
                     mu.data(),  g_x.data(), da.data(),  db.data(),  nullptr,    n};
    adjoint_cpu(args, 1);
    for (std::int64_t k = 0; k < n; ++k) {
        CHECK(std::abs(mu[k] - p.combined(p.b, k)) < 4e-6);   // up to 64 float additions
        CHECK(std::abs(g_x[k] - p.combined(p.a, k)) < 4e-6);  // up to 64 float additions
    }
    CHECK(mu[n] == kGuard && g_x[n] == kGuard);
    for (int j = 0; j < J; ++j) {
        double with_x = 0, with_f = 0;
        for (std::int64_t k = 0; k < n; ++k) {
            with_x += static_cast<double>(p.states[j][k]) * p.x[k];
            with_f += static_cast<double>(p.states[j][k]) * p.f[k];
        }
        CHECK(std::abs(da[j] - with_x) < 1e-7 * (1 + n) && std::abs(db[j] - with_f) < 1e-7 * (1 + n));
    }
    args.da = da2.data(), args.db = db2.data();
    adjoint_cpu(args, 3);
    CHECK(da == da2 && db == db2);
    args.f = nullptr, args.da = dots.data();
    adjoint_cpu(args, 2);
    CHECK(dots == da);
}

}  // namespace

void test_ops() {
    for (std::int64_t n : {1, 3, 129, 1134, 4096, 70001}) {
        for (int J : {1, 2, 5, 64}) {
            check_lincomb(n, J);
            check_adjoint(n, J);
        }
    }
    bool refused = false;
    try {
        visit(static_cast<DType>(9), [](auto) {});
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    CHECK(refused);
}
