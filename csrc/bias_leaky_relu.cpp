#include "bias_leaky_relu.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "bits.h"
#include "simd.h"

namespace gas {
namespace {

constexpr std::int64_t kBlock = 64;     // elements that share a word of bits
constexpr std::int64_t kChunk = 16384;  // elements a thread takes at a time
constexpr std::int64_t kRun = 4096;     // elements of a channel summed in lanes before double takes over
constexpr std::int64_t kRunRows = 64;   // the same where channels lie side by side: terms of each lane's sum
constexpr std::int64_t kColumns = 4096;
constexpr std::int64_t kParallelFrom = 32768;

// The biases of consecutive blocks of 64 elements, as 64 values each. Each thread has its own: a table that
// another core has just written costs more to read than to make.
template <class A>
class Biases {
  public:
    explicit Biases(const BiasLeakyReluArgs& args)
        : bias_(static_cast<const A*>(args.bias)), channels_(args.channels), inner_(args.inner) {
        if (bias_ == nullptr) {  // adding -0 changes nothing, not even a zero's sign
            bias_ = &kNothing;
            channels_ = 1;
            inner_ = std::max(args.n, kBlock);
        }
        if (inner_ >= kBlock) return;
        // Channels change within a block: one period of biases, and as much again as a block may overrun.
        period_ = channels_ * inner_;
        table_ = std::make_unique_for_overwrite<A[]>(static_cast<std::size_t>(period_ + kBlock));
        for (std::int64_t c = 0, k = 0; c < channels_; ++c, k += inner_) {
            constexpr int W = kLanes<A>;
            const auto lanes = Vec<A, W>{} + bias_[c];  // what it writes too far, the next channel overwrites
            for (std::int64_t r = 0; r < inner_; r += W) std::memcpy(&table_[k + r], &lanes, sizeof lanes);
        }
        for (std::int64_t k = period_; k < period_ + kBlock; ++k) table_[k] = table_[k - period_];
    }

    class Walk {
      public:
        Walk(const Biases& all, std::int64_t at) : all_(all) {
            if (all.period_ > 0) {
                position_ = at % all.period_;
                return;
            }
            c_ = at / all.inner_ % all.channels_;
            left_ = all.inner_ - at % all.inner_;
            std::fill_n(lanes_, kBlock, all.bias_[c_]);
        }

        const A* next() {
            if (all_.period_ > 0) {
                const A* biases = &all_.table_[position_];
                position_ += kBlock;
                if (position_ >= all_.period_) position_ %= all_.period_;
                return biases;
            }
            if (fresh_) {
                std::fill_n(lanes_, kBlock, all_.bias_[c_]);
                fresh_ = false;
            }
            if (left_ <= kBlock) {  // the block ends this plane, and holds the beginning of the next at most
                c_ = c_ + 1 == all_.channels_ ? 0 : c_ + 1;
                std::fill(lanes_ + left_, lanes_ + kBlock, all_.bias_[c_]);
                left_ += all_.inner_;
                fresh_ = true;
            }
            left_ -= kBlock;
            return lanes_;
        }

      private:
        const Biases& all_;
        std::int64_t position_ = 0, c_ = 0, left_ = 0;
        bool fresh_ = false;
        alignas(64) A lanes_[kBlock];
    };

  private:
    static constexpr A kNothing = A(-0.0);
    const A* bias_;
    std::int64_t channels_, inner_, period_ = 0;
    std::unique_ptr<A[]> table_;
};

struct Nothing {
    template <class V>
    void operator()(int, V) const {}
};

// y of `count` elements, at most 64, and the word of their signs. `bias` may be null; `sink` sees each
// vector.
template <bool Full, bool Stream, bool Packs, class T, class Sink = Nothing>
GAS_HD std::uint64_t block(const T* x, const Acc<T>* bias, Acc<T> slope, T* y, std::uint64_t word,
                           std::int64_t count, Sink sink = {}) {
    using A = Acc<T>;
    constexpr int W = kLanes<T>;
    using V = Vec<A, W>;
#pragma GCC unroll 32
    for (int k = 0; k < kBlock; k += W) {
        if (!Full && k >= count) break;
        V v = load<Full>(x + k, count - k);
        if (bias != nullptr) v += load<true>(bias + k, W);
        if constexpr (Packs) word |= positive_bits<A, W>(v) << k;
        V result;
        if constexpr (Packs)
            result = leaky(v, V{} + slope, v > 0);
        else
            result = leaky(v, V{} + slope, spread<A, W>(word >> k));
        store_lanes<Full, T, V, W, Stream>(y + k, result, count - k);
        sink(k, result);
    }
    return word;
}

template <bool Stream, bool Packs, class T>
void elementwise(const BiasLeakyReluArgs& args, int threads) {
    using A = Acc<T>;
    const auto x = static_cast<const T*>(args.x);
    const auto y = static_cast<T*>(args.y);
    const A slope = static_cast<A>(args.slope);
    const std::int64_t bytes = (args.n + 7) / 8, chunks = (args.n + kChunk - 1) / kChunk;
#pragma omp parallel num_threads(threads) if (threads > 1 && args.n >= kParallelFrom)
    {
        const Biases<A> biases(args);
#pragma omp for schedule(static)
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            std::int64_t at = chunk * kChunk;
            const std::int64_t end = std::min(at + kChunk, args.n);
            typename Biases<A>::Walk walk(biases, at);
            for (; at < end; at += kBlock) {
                const std::int64_t count = std::min(end - at, kBlock);
                const std::uint64_t word = Packs ? 0 : load_bits(args.bits, bytes, at);
                const A* bias = walk.next();
                const std::uint64_t signs =
                    count == kBlock ? block<true, Stream, Packs>(x + at, bias, slope, y + at, word, count)
                                    : block<false, Stream, Packs>(x + at, bias, slope, y + at, word, count);
                if (Packs && args.bits != nullptr) store_bits(args.bits, at / 8, signs, count);
            }
            if constexpr (Stream) stream_fence();
        }
    }
}

template <class V>
double sum_lanes(V v) {
    double sum = 0;
    for (unsigned lane = 0; lane < sizeof(V) / sizeof(v[0]); ++lane) sum += static_cast<double>(v[lane]);
    return sum;
}

// Planes of 64 elements and more: each run of a plane is one first-stage sum.
template <bool Stream, class T>
void backward_planes(const BiasLeakyReluArgs& args, int threads) {
    using A = Acc<T>;
    using V = Vec<A, kLanes<T>>;
    const auto x = static_cast<const T*>(args.x);
    const auto y = static_cast<T*>(args.y);
    const A slope = static_cast<A>(args.slope);
    const std::int64_t bytes = (args.n + 7) / 8, runs = (args.inner + kRun - 1) / kRun;
    const std::int64_t sums = args.n / args.inner * runs;
    std::vector<double> partial(sums);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.n >= kParallelFrom)
    for (std::int64_t i = 0; i < sums; ++i) {
        const std::int64_t plane = i / runs, first = i % runs * kRun;
        std::int64_t at = plane * args.inner + first;
        const std::int64_t end = at + std::min(kRun, args.inner - first);
        V sum[4]{};
        const auto add = [&](int k, V v) { sum[k / kLanes<T> % 4] += v; };
        for (; at < end; at += kBlock) {
            const std::uint64_t word = load_bits(args.bits, bytes, at);
            const std::int64_t count = std::min(end - at, kBlock);
            if (count == kBlock)
                block<true, Stream, false, T>(x + at, nullptr, slope, y + at, word, count, add);
            else
                block<false, Stream, false, T>(x + at, nullptr, slope, y + at, word, count, add);
        }
        partial[i] = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
        if constexpr (Stream) stream_fence();
    }
    std::vector<double> total(args.channels);
    for (std::int64_t i = 0; i < sums; ++i) total[i / runs % args.channels] += partial[i];
    std::copy(total.begin(), total.end(), static_cast<A*>(args.dbias));
}

// Smaller planes, down to channels side by side: the tensor as rows of whole periods of channels, summed down
// the columns.
template <bool Stream, class T>
void backward_rows(const BiasLeakyReluArgs& args, int threads) {
    using A = Acc<T>;
    using V = Vec<A, kLanes<T>>;
    const auto x = static_cast<const T*>(args.x);
    const auto y = static_cast<T*>(args.y);
    const A slope = static_cast<A>(args.slope);
    const std::int64_t period = args.channels * args.inner, whole_blocks = std::lcm(period, kBlock);
    const std::int64_t length = whole_blocks <= kColumns ? whole_blocks : period;
    const std::int64_t rows = (args.n + length - 1) / length;  // the last one may be shorter
    const std::int64_t splits = std::clamp<std::int64_t>(rows / kRunRows, 1, 64);
    const std::int64_t groups = (length + kColumns - 1) / kColumns;
    const std::int64_t bytes = (args.n + 7) / 8;
    std::vector<double> partial(splits * length);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && args.n >= kParallelFrom)
    for (std::int64_t task = 0; task < splits * groups; ++task) {
        const std::int64_t split = task / groups, left = task % groups * kColumns;
        const std::int64_t width = std::min(kColumns, length - left);
        const std::int64_t first = rows * split / splits, last = rows * (split + 1) / splits;
        double* total = partial.data() + split * length + left;
        alignas(64) A sums[kColumns + kBlock];
        for (std::int64_t run = first; run < last; run += kRunRows) {
            std::fill_n(sums, kColumns + kBlock, A{});
            for (std::int64_t row = run; row < std::min(run + kRunRows, last); ++row) {
                const std::int64_t begin = row * length + left, end = std::min(begin + width, args.n);
                for (std::int64_t at = begin; at < end; at += kBlock) {
                    A* const column = sums + (at - begin);
                    const auto add = [&](int k, V v) {
                        V sum = load<true>(column + k, 0) + v;
                        std::memcpy(column + k, &sum, sizeof sum);
                    };
                    const std::uint64_t word = load_bits(args.bits, bytes, at);
                    const std::int64_t count = std::min(end - at, kBlock);
                    if (count == kBlock)
                        block<true, Stream, false, T>(x + at, nullptr, slope, y + at, word, count, add);
                    else
                        block<false, Stream, false, T>(x + at, nullptr, slope, y + at, word, count, add);
                }
            }
            for (std::int64_t k = 0; k < width; ++k) total[k] += static_cast<double>(sums[k]);
        }
        if constexpr (Stream) stream_fence();
    }
    std::vector<double> total(args.channels);
    for (std::int64_t split = 0; split < splits; ++split) {
        const double* sums = partial.data() + split * length;
        for (std::int64_t c = 0, k = 0; k < length; c = c + 1 == args.channels ? 0 : c + 1) {
            for (std::int64_t r = 0; r < args.inner; ++r) total[c] += sums[k++];
        }
    }
    std::copy(total.begin(), total.end(), static_cast<A*>(args.dbias));
}

template <bool Stream, class T>
void run(const BiasLeakyReluArgs& args, int threads) {
    if (args.dbias == nullptr) {
        args.packs ? elementwise<Stream, true, T>(args, threads)
                   : elementwise<Stream, false, T>(args, threads);
    } else if (args.inner >= kBlock) {
        backward_planes<Stream, T>(args, threads);
    } else {
        backward_rows<Stream, T>(args, threads);
    }
}

}  // namespace

void bias_leaky_relu_cpu(const BiasLeakyReluArgs& args, int threads) {
    visit(args.dtype, [&]<class T>(T) {
        // Planes and rows must begin where a vector may be streamed to.
        const std::int64_t line = kVectorBytes / static_cast<int>(sizeof(T));
        const std::int64_t row = args.inner >= kBlock ? args.inner : args.channels * args.inner;
        const bool stream = streams(args.y, args.n * static_cast<std::int64_t>(sizeof(T))) &&
                            (args.dbias == nullptr || row % line == 0);
        stream ? run<true, T>(args, threads) : run<false, T>(args, threads);
    });
}

}  // namespace gas
