// A step and its inverse give the first state back, bit for bit, for every storage type and any bit pattern.
#include <cstring>
#include <vector>

#include "../reversible.h"
#include "check.h"

using namespace gas;

namespace {

constexpr std::uint8_t kGuard = 0xab;

void check_round_trip(DType dtype, DType output_dtype, std::int64_t n, double first, int threads) {
    const std::size_t size = static_cast<std::size_t>(bytes(dtype)), count = static_cast<std::size_t>(n);
    std::uint64_t seed = 17 + count;
    // Random bytes: numbers of every magnitude, infinities and NaN among them.
    const auto random = [&](std::size_t length) {
        std::vector<std::uint8_t> data(length);
        for (auto& byte : data)
            byte = static_cast<std::uint8_t>((seed = seed * 6364136223846793005u + 1) >> 56);
        return data;
    };
    auto previous = random(count * size), current = random(count * size);
    auto output = random(count * static_cast<std::size_t>(bytes(output_dtype)));
    std::vector<std::uint8_t> next(count * size + 8, kGuard), back(count * size + 8, kGuard);
    std::vector<std::int8_t> code(count + 1, 99);
    const double coef[3] = {first, 0.25, -0.5};
    ReversibleArgs args{dtype,        previous.data(), current.data(),
                        output_dtype, output.data(),   coef,
                        next.data(),  code.data(),     n,
                        false};
    reversible_cpu(args, threads);
    args.previous = back.data();
    args.inverse = true;
    reversible_cpu(args, 3 - threads);
    for (std::size_t k = 0; k < count; ++k) {
        if (code[k] != kEscape) CHECK(std::memcmp(&back[k * size], &previous[k * size], size) == 0);
    }
    CHECK(code[count] == 99);
    for (std::size_t k = count * size; k < next.size(); ++k) CHECK(next[k] == kGuard && back[k] == kGuard);
}

}  // namespace

void test_reversible() {
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
        for (const std::int64_t n : {1, 3, 129, 1134, 70001}) {
            check_round_trip(dtype, dtype, n, 0.8, 1);
            check_round_trip(dtype, DType::bf16, n, -1.0, 2);
        }
    }
}
