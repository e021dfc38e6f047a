#include "core/accumulate.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "core/half.hpp"
#include "core/rows.hpp"
#include "core/simd.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

FASTNNUNET_CLONES
void set_weighted(const float* __restrict logits, const float* __restrict weights, Half* __restrict sums,
                  std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] = to_half(logits[i] * weights[i]);
}

FASTNNUNET_CLONES
void add_weighted(const float* __restrict logits, const float* __restrict weights, Half* __restrict sums,
                  std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] = to_half(to_float(sums[i]) + logits[i] * weights[i]);
}

FASTNNUNET_CLONES
void add_halves(const Half* __restrict values, Half* __restrict sums, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] = to_half(to_float(sums[i]) + to_float(values[i]));
}

FASTNNUNET_CLONES
void divide(Half* __restrict sums, const Half* __restrict total, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] = to_half(to_float(sums[i]) / to_float(total[i]));
}

FASTNNUNET_CLONES
void round_row(const float* values, float* out, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = round_to_half(values[i]);
}

template <class A, class B>
void require_equal_shapes(const A& a, const B& b) {
    if (a.shape != b.shape) throw std::invalid_argument("accumulation: arrays of different shapes");
}

// body(head, row number) over all rows of all heads, planes in parallel
template <class Body>
void for_each_row(const Volumes<Half>& sums, int threads, const Body& body) {
    parallel_for(sums.count * sums.shape[0], threads, [&](std::int64_t number) {
        const std::int64_t head = number / sums.shape[0], z = number % sums.shape[0];
        for (std::int64_t y = 0; y < sums.shape[1]; ++y) body(head, z, y);
    });
}

}  // namespace

void add_weighted(const Volumes<const float>& logits, const Volume<const float>& weights, const Volumes<Half>& sums,
                  bool is_first, int threads) {
    require_equal_shapes(logits, sums);
    require_equal_shapes(weights, sums);
    if (logits.count != sums.count) throw std::invalid_argument("accumulation: different numbers of heads");
    for_each_row(sums, threads, [&](std::int64_t head, std::int64_t z, std::int64_t y) {
        const auto kernel = is_first ? set_weighted
                                     : static_cast<void (*)(const float*, const float*, Half*, std::int64_t)>(add_weighted);
        kernel(logits[head].row(z, y), weights.row(z, y), sums[head].row(z, y), sums.shape[2]);
    });
}

void add_halves(const Volumes<const Half>& values, const Volumes<Half>& sums, int threads) {
    require_equal_shapes(values, sums);
    if (values.count != sums.count) throw std::invalid_argument("accumulation: different numbers of heads");
    for_each_row(sums, threads, [&](std::int64_t head, std::int64_t z, std::int64_t y) {
        add_halves(values[head].row(z, y), sums[head].row(z, y), sums.shape[2]);
    });
}

QuotientLimits divide(const Volumes<Half>& sums, const Volume<const Half>& total, int threads) {
    require_equal_shapes(total, sums);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const QuotientLimits none{kInfinity, -kInfinity, kInfinity, -kInfinity};
    std::vector<QuotientLimits> planes(sums.count * sums.shape[0], none);
    for_each_row(sums, threads, [&](std::int64_t head, std::int64_t z, std::int64_t y) {
        QuotientLimits& limits = planes[head * sums.shape[0] + z];
        Half* row = sums[head].row(z, y);
        extend_limits(row, sums.shape[2], limits.sum_low, limits.sum_high);
        divide(row, total.row(z, y), sums.shape[2]);
        extend_limits(row, sums.shape[2], limits.quotient_low, limits.quotient_high);
    });
    QuotientLimits all = none;
    for (const QuotientLimits& plane : planes) {
        const float values[] = {plane.sum_low, plane.sum_high};
        const float quotients[] = {plane.quotient_low, plane.quotient_high};
        extend_limits(values, 2, all.sum_low, all.sum_high);
        extend_limits(quotients, 2, all.quotient_low, all.quotient_high);
    }
    return all;
}

void round_to_half(const Volume<const float>& values, const Volume<float>& out, int threads) {
    require_equal_shapes(values, out);
    parallel_for(values.rows(), threads, [&](std::int64_t row) {
        round_row(values.row(row), out.row(row), values.shape[2]);
    });
}

}  // namespace fastnnunet
