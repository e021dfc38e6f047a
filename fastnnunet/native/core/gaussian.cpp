#include "core/gaussian.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "core/half.hpp"

namespace fastnnunet {
namespace {

constexpr double kSigmaScale = 1.0 / 8;
constexpr double kPeak = 10;
constexpr double kTruncate = 4;  // sigmas: the default of scipy.ndimage.gaussian_filter

// A delta at size // 2 after the filter, zeros beyond its kernel.
std::vector<double> filtered_delta(std::int64_t size) {
    const double sigma = static_cast<double>(size) * kSigmaScale;
    const auto radius = static_cast<std::int64_t>(kTruncate * sigma + 0.5);
    std::vector<double> kernel(2 * radius + 1);
    for (std::int64_t i = -radius; i <= radius; ++i) {
        kernel[i + radius] = std::exp(-0.5 / (sigma * sigma) * static_cast<double>(i * i));
    }
    const double sum = std::accumulate(kernel.begin(), kernel.end(), 0.0);
    std::vector<double> out(size, 0.0);
    for (std::int64_t i = 0; i < size; ++i) {
        const std::int64_t distance = i - size / 2;
        if (std::abs(distance) <= radius) out[i] = kernel[distance + radius] / sum;
    }
    return out;
}

}  // namespace

std::vector<float> gaussian_weights(const std::vector<std::int64_t>& tile) {
    std::vector<double> product{1.0};
    double highest = 1;
    for (const std::int64_t size : tile) {
        if (size < 1) throw std::invalid_argument("a tile needs at least one voxel along each axis");
        const std::vector<double> along = filtered_delta(size);
        std::vector<double> outer;
        outer.reserve(product.size() * along.size());
        for (const double value : product) {
            for (const double factor : along) outer.push_back(value * factor);
        }
        product = std::move(outer);
        highest *= along[size / 2];
    }
    const double scale = highest / kPeak;
    std::vector<float> weights(product.size());
    float least = std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < product.size(); ++i) {
        // through float32, as torch converts float64 to float16
        weights[i] = round_to_half(static_cast<float>(product[i] / scale));
        if (weights[i] > 0) least = std::min(least, weights[i]);
    }
    std::replace(weights.begin(), weights.end(), 0.0f, least);
    return weights;
}

}  // namespace fastnnunet
