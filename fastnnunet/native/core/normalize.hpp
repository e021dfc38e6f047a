// nnU-Net's intensity normalisation, in place on one channel, with its float32 operations in their order.
//
// Sums are NumPy's (pairwise, float32) over the values in the order of memory, so mean and standard deviation are
// nnU-Net's to the bit where the channel is contiguous. Of a cropped channel NumPy adds up in pieces that depend on its
// version; there they may differ in the last bits.
#pragma once

#include <cstdint>
#include <optional>

#include "core/view.hpp"

namespace fastnnunet {

using Channel = Volume<float>;
using Mask = Volume<const std::uint8_t>;  // inside where not 0

struct Moments {
    float mean;
    float std;
};

// NaN for no values, as NumPy. `mask`: of these voxels only.
Moments moments(const Channel& channel, const std::optional<Mask>& mask, int threads);

// (value - mean) / max(std, 1e-8) of the channel's own values, or of those inside the mask, the others left alone
void z_score(const Channel& channel, const std::optional<Mask>& mask, int threads);

// (clip(value, low, high) - mean) / max(std, 1e-8)
void clip_and_scale(const Channel& channel, float low, float high, float mean, float std, int threads);

void rescale_to_01(const Channel& channel, int threads);

struct Range {
    float low, high;
};

Range range_of(const Volume<const float>& channel, int threads);

// value / 255 if all are from 0 to 255; else leaves the channel as it is. Returns the range it had.
Range rgb_to_01(const Channel& channel, int threads);

}  // namespace fastnnunet
