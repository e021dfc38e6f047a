// Interpolation along one axis: separable resampling is one of these per axis.
//
// scipy.ndimage.zoom(grid_mode=True, mode="nearest"), which scikit-image's resize calls, is linear and separable, so
// zooming a volume is the same as applying a one-dimensional operator per axis.
#pragma once

#include <cstdint>
#include <vector>

namespace fastnnunet {

enum class Convention { scipy, torch };

// Takes size_in samples to size_out; half-pixel centres, border values repeated. `order` is that of the spline: 0
// nearest, 1 linear, 2 to 5 with prefilter (scipy only). torch computes coordinates in float32, and its order 0 is
// "nearest-exact". Equal sizes are the identity.
class AxisOperator {
public:
    // Throws std::invalid_argument for sizes below 1 and orders that do not exist.
    AxisOperator(std::int64_t size_in, std::int64_t size_out, int order, Convention convention);

    std::int64_t size_in() const { return size_in_; }
    std::int64_t size_out() const { return size_out_; }
    bool is_identity() const { return size_in_ == size_out_; }
    bool is_selection() const { return taps_ == 1; }      // every output is one input
    bool is_local() const { return poles_.empty(); }      // every output depends on two inputs at most
    int taps() const { return taps_; }
    const std::vector<double>& poles() const { return poles_; }  // of the recursions of `prefilter`

    // Output i is the sum over t of weight(i)[t] * samples[first(i) + t]. A spline's samples are its coefficients, with
    // `padding` of them before the first input.
    std::int64_t padding() const { return poles_.empty() ? 0 : kSplinePadding; }
    std::int64_t padded_size() const { return size_in_ + 2 * padding(); }
    const std::int32_t* first() const { return first_.data(); }
    const double* weights() const { return weights_.data(); }

    // The input that output i coincides with, or -1. A spline passes through its samples, but its filter rounds: taking
    // the sample itself keeps exact what is exact (means of two planes are ties in float32).
    std::int32_t sample(std::int64_t i) const { return sample_.empty() ? -1 : sample_[i]; }

    // samples: (padded_size, lanes), inputs from row `padding` on. Fills the padding and filters, if it is a spline.
    void prefilter(double* samples, std::int64_t lanes) const;

    // out (size_out, lanes) from samples (padded_size, lanes)
    void combine(const double* samples, double* out, std::int64_t lanes) const;

private:
    static constexpr std::int64_t kSplinePadding = 12;  // scipy pads that much before it filters for mode="nearest"

    std::int64_t size_in_;
    std::int64_t size_out_;
    int taps_ = 1;
    std::vector<double> poles_;
    std::vector<std::int32_t> first_;
    std::vector<std::int32_t> sample_;
    std::vector<double> weights_;
};

}  // namespace fastnnunet
