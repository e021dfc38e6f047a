// The weight of each voxel of a tile: high in the centre, low at the rim.
#pragma once

#include <cstdint>
#include <vector>

namespace fastnnunet {

// nnU-Net's importance map in C order: float32 values that are exactly its float16 ones.
//
// scipy.ndimage.gaussian_filter(delta at T // 2, sigma = T / 8, mode="constant"), scaled to a peak of 10, cast to
// float16, zeros replaced by the smallest weight that is not zero. The filter of a delta is the outer product of its
// one-dimensional kernels. Intermediate values are off by a few units in the last place of float64 where exp and the
// order of sums differ, as SciPy's are between processors: 2^40 times less than float16 resolves.
// Throws std::invalid_argument for an axis without voxels.
std::vector<float> gaussian_weights(const std::vector<std::int64_t>& tile);

}  // namespace fastnnunet
