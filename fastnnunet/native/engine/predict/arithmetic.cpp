#include "predict/arithmetic.hpp"

#include <cmath>
#include <cstdio>

#include "core/accumulate.hpp"
#include "core/gaussian.hpp"
#include "core/half.hpp"
#include "error.hpp"

namespace fastnnunet::engine {
namespace {

// One value for every voxel, in a row that all rows share
template <class T>
Volume<const T> everywhere(const std::vector<T>& row, const Index& shape) {
    return {row.data(), shape, {0, 0}};
}

}  // namespace

TileWeights::TileWeights(const Sizes& patch, bool use_gaussian) {
    const Index tile = patch.size() == 2 ? Index{1, patch[0], patch[1]} : Index{patch[0], patch[1], patch[2]};
    values_ = Array4<float>(1, tile);
    halves_ = Array4<Half>(1, tile);
    if (use_gaussian) {
        const std::vector<float> gaussian = gaussian_weights(patch);
        std::copy(gaussian.begin(), gaussian.end(), values_.values.get());
    } else {
        std::fill(values_.values.get(), values_.values.get() + values_.size(), 1.0f);
    }
    for (std::int64_t i = 0; i < values_.size(); ++i) halves_.values[i] = to_half(values_.values[i]);  // exact
}

Array4<Half> TileWeights::total(const ChunkedWindow& window, int threads) const {
    const Index padded = padded_shape(window);
    const std::lock_guard lock(turn_);
    for (const Array4<Half>& kept : kept_) {
        if (kept.shape == padded) return kept;
    }
    Array4<Half> made(1, padded);
    std::fill(made.values.get(), made.values.get() + made.size(), Half{0});
    for (std::int64_t number = 0; number < window.tiles(); ++number) {
        fastnnunet::add_halves(halves_.read(), part(made.view(), in_padded(window, number)),
                               pass_threads(threads, halves_.size()));
    }
    kept_.push_front(made);
    if (kept_.size() > 2) kept_.pop_back();
    return made;
}

Index padded_shape(const ChunkedWindow& window) {
    Index padded{};
    for (int axis = 0; axis < 3; ++axis) {
        const Sizes& starts = window.starts()[axis];
        padded[axis] = starts.back() + window.tile()[axis] - starts.front();
    }
    return padded;
}

Box in_padded(const ChunkedWindow& window, std::int64_t tile) {
    Box box{window.tile_start(tile), {}};
    for (int axis = 0; axis < 3; ++axis) {
        box.start[axis] -= window.starts()[axis].front();
        box.stop[axis] = box.start[axis] + window.tile()[axis];
    }
    return box;
}

Array4<Half> HostArithmetic::zeros(std::int64_t heads, const Index& shape) {
    return filled(std::vector<Half>(static_cast<std::size_t>(heads), Half{0}), shape);
}

Array4<Half> HostArithmetic::filled(const std::vector<Half>& values, const Index& shape) {
    Array4<Half> made(static_cast<std::int64_t>(values.size()), shape);
    Half* to = made.values.get();
    for (const Half value : values) to = std::fill_n(to, voxels_of(shape), value);
    return made;
}

WindowWeights HostArithmetic::weights(const TileWeights& of_tile, const ChunkedWindow& window) {
    return {of_tile.tile(), of_tile.total(window, threads_)};
}

void HostArithmetic::add_weighted(const Volumes<const float>& logits, const Volume<const float>* weights,
                                  const Volumes<Half>& sums, bool is_first) {
    const std::vector<float> ones(weights == nullptr ? static_cast<std::size_t>(sums.shape[2]) : 0, 1.0f);
    fastnnunet::add_weighted(logits, weights == nullptr ? everywhere(ones, sums.shape) : *weights, sums, is_first,
                             pass_threads(threads_, sums.count * voxels_of(sums.shape)));
}

void HostArithmetic::add_halves(const Volumes<const Half>& values, const Volumes<Half>& sums) {
    fastnnunet::add_halves(values, sums, pass_threads(threads_, sums.count * voxels_of(sums.shape)));
}

void HostArithmetic::divide(const Volumes<Half>& sums, const Volume<const Half>& total, const std::string& what) {
    const QuotientLimits limits =
        fastnnunet::divide(sums, total, pass_threads(threads_, sums.count * voxels_of(sums.shape), 8));
    check_half(limits.sum_low, limits.sum_high, what);
    check_half(limits.quotient_low, limits.quotient_high, "the logits");
}

void HostArithmetic::divide(const Volumes<Half>& sums, std::int64_t count, const std::string& what) {
    const std::vector<Half> row(static_cast<std::size_t>(sums.shape[2]), to_half(static_cast<float>(count)));
    divide(sums, everywhere(row, sums.shape), what);
}

void HostArithmetic::copy(const Volumes<const Half>& from, const Volumes<Half>& to) {
    for (std::int64_t head = 0; head < from.count; ++head) {
        const Volume<const Half> source = from[head];
        const Volume<Half> target = to[head];
        for (std::int64_t row = 0; row < source.rows(); ++row) {
            std::copy(source.row(row), source.row(row) + source.shape[2], target.row(row));
        }
    }
}

void check_half(float low, float high, const std::string& what) {
    if (fits_half(low, high)) return;
    char range[64];
    std::snprintf(range, sizeof range, "%g to %g", static_cast<double>(low), static_cast<double>(high));
    if (std::isnan(low) || std::isnan(high)) std::snprintf(range, sizeof range, "nan to nan");
    throw BackendError(what + " left the range of float16: got values from " + range +
                       ", expected less than 65520 in " +
                       "magnitude\nthe model is damaged or was trained on other intensities than this image has");
}

}  // namespace fastnnunet::engine
