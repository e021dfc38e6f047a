// NumPy's archives: what nnU-Net writes probabilities into.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace fastnnunet::images {

// Writes `probabilities.npy`, float32 (heads, z, y, x), contiguous, as the one entry of a compressed .npz: to a sibling
// first, so `path` is whole or as it was. Throws ImageError, WriteError.
void write_probabilities(const std::string& path, const float* values, const std::array<std::int64_t, 4>& shape_HZYX);

// Whether a file ends as a .npz of probabilities does; the list of what is in it is its end.
bool is_probabilities(const std::string& path);

}  // namespace fastnnunet::images
