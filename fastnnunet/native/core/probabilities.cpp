#include "core/probabilities.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/simd.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

// 2^n times a polynomial, in float64: what is left out of the series is below 1e-11, and the cast rounds once. Beyond
// the range of float32 it gives 0 and infinity, as the cast does.
FASTNNUNET_INLINE float exponential(float value) {
    constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
    constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number in the last bits
    const double wide = static_cast<double>(value);
    const double limited = wide < -200 ? -200 : wide > 200 ? 200 : wide;
    const double twos = limited * kLog2e, shifted = twos + kShift;
    const double x = (twos - (shifted - kShift)) * kLn2;  // up to 0.35 in magnitude
    double series = 1.0 / 362880;
    series = series * x + 1.0 / 40320;
    series = series * x + 1.0 / 5040;
    series = series * x + 1.0 / 720;
    series = series * x + 1.0 / 120;
    series = series * x + 1.0 / 24;
    series = series * x + 1.0 / 6;
    series = series * x + 0.5;
    series = series * x + 1;
    series = series * x + 1;
    std::uint64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;  // the whole number as the exponent of a float64
    double power;
    std::memcpy(&power, &bits, sizeof power);
    return static_cast<float>(series * power);
}

FASTNNUNET_CLONES
void extend_largest(const float* values, float* largest, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) largest[i] = values[i] > largest[i] ? values[i] : largest[i];
}

FASTNNUNET_CLONES
void exponentials_of_row(float* values, const float* largest, float* sums, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        values[i] = exponential(values[i] - largest[i]);
        sums[i] += values[i];
    }
}

FASTNNUNET_CLONES
void divide_row(float* values, const float* sums, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) values[i] /= sums[i];
}

FASTNNUNET_CLONES
void sigmoid_row(float* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = 1.0f / (1.0f + exponential(-values[i]));
}

}  // namespace

void softmax_heads(const Volumes<float>& logits, int threads) {
    struct Rows {
        std::vector<float> largest, sums;
    };
    if (logits.count == 0) return;
    const std::int64_t width = logits.shape[2];
    parallel_for<Rows>(logits[0].rows(), threads, [&](std::int64_t number, Rows& rows) {
        const float* first = logits[0].row(number);
        rows.largest.assign(first, first + width);
        rows.sums.assign(static_cast<std::size_t>(width), 0.0f);
        for (std::int64_t head = 1; head < logits.count; ++head) {
            extend_largest(logits[head].row(number), rows.largest.data(), width);
        }
        for (std::int64_t head = 0; head < logits.count; ++head) {
            exponentials_of_row(logits[head].row(number), rows.largest.data(), rows.sums.data(), width);
        }
        for (std::int64_t head = 0; head < logits.count; ++head) {
            divide_row(logits[head].row(number), rows.sums.data(), width);
        }
    });
}

void sigmoid_heads(const Volumes<float>& logits, int threads) {
    if (logits.count == 0) return;
    const std::int64_t rows = logits[0].rows();
    parallel_for(logits.count * rows, threads, [&](std::int64_t number) {
        sigmoid_row(logits[number / rows].row(number % rows), logits.shape[2]);
    });
}

}  // namespace fastnnunet
