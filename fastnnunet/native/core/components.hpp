// Connected components and holes of a binary volume, by runs of voxels along x.
#pragma once

#include <cstdint>
#include <vector>

#include "core/view.hpp"

namespace fastnnunet {

// Labels 1, 2, ... in the order in which a scan (z, y, x) meets the components, 0 outside: scipy.ndimage.label's
// numbers. `connectivity`: the most axes in which neighbours differ (1: 6 neighbours, 2: 18, 3: 26). Returns the number
// of voxels of each component, that of label 1 first. Throws std::invalid_argument for another connectivity.
std::vector<std::int64_t> label_components(const Volume<const std::uint8_t>& mask, int connectivity,
                                           const Volume<std::int32_t>& labels, int threads);

// Sets the zeros that no path over faces connects to the border of the volume to 1, as scipy.ndimage.binary_fill_holes.
void fill_holes(const Volume<std::uint8_t>& mask, int threads);

}  // namespace fastnnunet
