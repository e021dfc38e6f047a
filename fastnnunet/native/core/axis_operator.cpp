#include "core/axis_operator.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "core/simd.hpp"

namespace fastnnunet {
namespace {

// Roots inside the unit circle of the B-spline's z-transform (Unser, Aldroubi, Eden 1993, table I).
std::vector<double> spline_poles(int order) {
    switch (order) {
        case 2: return {std::sqrt(8.0) - 3.0};
        case 3: return {std::sqrt(3.0) - 2.0};
        case 4:
            return {std::sqrt(664.0 - std::sqrt(438976.0)) + std::sqrt(304.0) - 19.0,
                    std::sqrt(664.0 + std::sqrt(438976.0)) - std::sqrt(304.0) - 19.0};
        case 5:
            return {std::sqrt(67.5 - std::sqrt(4436.25)) + std::sqrt(26.25) - 6.5,
                    std::sqrt(67.5 + std::sqrt(4436.25)) - std::sqrt(26.25) - 6.5};
        default: return {};
    }
}

// The centred B-spline of an order at x: sum over k of (-1)^k binomial(n + 1, k) (x + (n + 1) / 2 - k)_+^n / n!
double b_spline(int order, double x) {
    double sum = 0, binomial = 1, factorial = 1;
    for (int k = 2; k <= order; ++k) factorial *= k;
    for (int k = 0; k <= order + 1; ++k) {
        const double base = x + 0.5 * (order + 1) - k;
        if (base <= 0) break;
        sum += (k % 2 ? -1 : 1) * binomial * std::pow(base, order);
        binomial = binomial * (order + 1 - k) / (k + 1);
    }
    return sum / factorial;
}

FASTNNUNET_CLONES
void recurse_forward(double* samples, std::int64_t count, std::int64_t lanes, double pole) {
    for (std::int64_t i = 1; i < count; ++i) {
        double* now = samples + i * lanes;
        const double* before = now - lanes;
        for (std::int64_t lane = 0; lane < lanes; ++lane) now[lane] += pole * before[lane];
    }
}

FASTNNUNET_CLONES
void recurse_backward(double* samples, std::int64_t count, std::int64_t lanes, double pole) {
    for (std::int64_t i = count - 2; i >= 0; --i) {
        double* now = samples + i * lanes;
        const double* after = now + lanes;
        for (std::int64_t lane = 0; lane < lanes; ++lane) now[lane] = pole * (after[lane] - now[lane]);
    }
}

// The start of scipy's forward recursion for signals reflected about the edge of their last sample (mode="nearest").
FASTNNUNET_CLONES
void start_reflected(double* samples, std::int64_t count, std::int64_t lanes, double pole) {
    const double pole_n = std::pow(pole, static_cast<double>(count));
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
        const double first = samples[lane];
        double sum = first + pole_n * samples[(count - 1) * lanes + lane];
        double power = pole;
        // beyond 1e-20 nothing changes a double any more
        for (std::int64_t i = 1; i < count && std::abs(power) > 1e-20; ++i, power *= pole) {
            sum += power * (samples[i * lanes + lane] + pole_n * samples[(count - 1 - i) * lanes + lane]);
        }
        samples[lane] = first + sum * (pole / (1 - pole_n * pole_n));
    }
}

template <int Taps>
FASTNNUNET_INLINE void combine_taps(const double* samples, const std::int32_t* first, const double* weights,
                                    std::int64_t count, double* out, std::int64_t lanes) {
    for (std::int64_t i = 0; i < count; ++i) {
        const double* in = samples + first[i] * lanes;
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
            double sum = weights[0] * in[lane];
            for (int tap = 1; tap < Taps; ++tap) sum += weights[tap] * in[tap * lanes + lane];
            out[lane] = sum;
        }
        weights += Taps;
        out += lanes;
    }
}

FASTNNUNET_CLONES
void combine_lanes(const double* samples, const std::int32_t* first, const double* weights, int taps,
                   std::int64_t count, double* out, std::int64_t lanes) {
    switch (taps) {
        case 1: return combine_taps<1>(samples, first, weights, count, out, lanes);
        case 2: return combine_taps<2>(samples, first, weights, count, out, lanes);
        case 3: return combine_taps<3>(samples, first, weights, count, out, lanes);
        case 4: return combine_taps<4>(samples, first, weights, count, out, lanes);
        case 5: return combine_taps<5>(samples, first, weights, count, out, lanes);
        default: return combine_taps<6>(samples, first, weights, count, out, lanes);
    }
}

}  // namespace

AxisOperator::AxisOperator(std::int64_t size_in, std::int64_t size_out, int order, Convention convention)
    : size_in_(size_in), size_out_(size_out) {
    if (size_in < 1 || size_out < 1) throw std::invalid_argument("resampling of an axis without samples");
    if (order < 0 || order > (convention == Convention::scipy ? 5 : 1)) {
        throw std::invalid_argument("interpolation order " + std::to_string(order) + " does not exist here");
    }
    if (is_identity()) order = 0;
    poles_ = order > 1 ? spline_poles(order) : std::vector<double>();
    taps_ = order == 1 && size_in == 1 ? 1 : order + 1;
    first_.resize(size_out);
    weights_.resize(size_out * taps_);
    if (order > 1) sample_.assign(size_out, -1);
    double gain = 1;  // of the recursions; scipy multiplies the samples by it, here it is part of the weights
    for (const double pole : poles_) gain *= (1 - pole) * (1 - 1 / pole);
    const double last = static_cast<double>(size_in - 1);
    const float scale32 = static_cast<float>(size_in) / static_cast<float>(size_out);
    const double scale = static_cast<double>(size_in) / static_cast<double>(size_out);
    for (std::int64_t i = 0; i < size_out; ++i) {
        double position;
        if (is_identity()) {
            position = static_cast<double>(i);
        } else if (convention == Convention::torch) {
            const float centre = (static_cast<float>(i) + 0.5f) * scale32;
            position = order == 0 ? std::floor(centre) : std::max(centre - 0.5f, 0.0f);
            position = std::min(position, last);
        } else {
            position = (static_cast<double>(i) + 0.5) * scale - 0.5;
            // a spline goes on into its padding
            if (order <= 1) position = std::clamp(position, 0.0, last);
        }
        double* weight = &weights_[i * taps_];
        if (order <= 1) {
            const double low = std::floor(order == 0 ? position + 0.5 : position);
            if (taps_ == 1) {
                first_[i] = order == 0 ? static_cast<std::int32_t>(low) : 0;
                weight[0] = 1;
            } else {
                first_[i] = static_cast<std::int32_t>(std::min(low, last - 1));
                weight[1] = position - first_[i];
                weight[0] = 1 - weight[1];
            }
        } else {
            const double in_padded = position + kSplinePadding;
            const double start = std::floor(order % 2 ? in_padded : in_padded + 0.5) - order / 2;
            first_[i] = static_cast<std::int32_t>(start);
            if (position == std::floor(position)) sample_[i] = static_cast<std::int32_t>(position);
            for (int tap = 0; tap < taps_; ++tap) weight[tap] = gain * b_spline(order, in_padded - start - tap);
        }
    }
}

void AxisOperator::prefilter(double* samples, std::int64_t lanes) const {
    if (poles_.empty()) return;
    const std::int64_t count = padded_size();
    const double* first = samples + kSplinePadding * lanes;
    const double* last = samples + (count - 1 - kSplinePadding) * lanes;
    for (std::int64_t i = 0; i < kSplinePadding; ++i) {
        std::copy(first, first + lanes, samples + i * lanes);
        std::copy(last, last + lanes, samples + (count - 1 - i) * lanes);
    }
    for (const double pole : poles_) {
        start_reflected(samples, count, lanes, pole);
        recurse_forward(samples, count, lanes, pole);
        double* end = samples + (count - 1) * lanes;
        for (std::int64_t lane = 0; lane < lanes; ++lane) end[lane] *= pole / (pole - 1);
        recurse_backward(samples, count, lanes, pole);
    }
}

void AxisOperator::combine(const double* samples, double* out, std::int64_t lanes) const {
    combine_lanes(samples, first_.data(), weights_.data(), taps_, size_out_, out, lanes);
}

}  // namespace fastnnunet
