// Where an image of several channels is not zero.
#pragma once

#include <cstdint>

#include "core/view.hpp"

namespace fastnnunet {

// Around the voxels that are not zero in any channel; the whole image if there are none. NaN is not zero.
Box nonzero_box(const Volumes<const float>& channels, int threads);

// mask = 1 where any channel is not zero, else 0
void nonzero_mask(const Volumes<const float>& channels, const Volume<std::uint8_t>& mask, int threads);

}  // namespace fastnnunet
