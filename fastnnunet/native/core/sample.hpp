// Values and labels at the points of a grid: what rotation, scaling and deformation of a training patch read.
#pragma once

#include <array>
#include <cstdint>

#include "core/view.hpp"

namespace fastnnunet {

using Shape = std::array<std::int64_t, 3>;  // z, y, x

// `axes` coordinates a point, x first, in the units of torch's grid_sample without align_corners: -1 and 1 are the outer
// faces of the outermost voxels. With 2 axes volumes have one plane.
struct Grid {
    const float* coordinates;  // (points, axes)
    std::int64_t points, axes;
};

// values_out (channels, points): interpolated linearly, 0 outside, by torch's operations in torch's order.
// labels_out (channels, points): of the labels around a point, and `outside` beyond the border, the one of the largest
// weight, as nnU-Net's SpatialTransform finds it (seg_tiebreak="nearest"): weights times 1000 compared as float16, ties
// to the nearest neighbour where it is one of the tied, else to the smallest label. Costs the same for any number of
// labels, of which only the neighbours of a point can win.
void sample(const Volumes<const float>& values, const Volumes<const std::int16_t>& labels, const Grid& grid,
            std::int16_t outside, float* values_out, std::int16_t* labels_out, int threads);

// out (channels, points): the mean of the neighbours of a point that there are, by their weights; `nothing` where they
// have less than half of the weight. The grid counts in `space`, of which `values` are the box that starts at `lower`.
void sample_inside(const Volumes<const float>& values, const Shape& space, const Shape& lower, const Grid& grid,
                   float nothing, float* out, int threads);

}  // namespace fastnnunet
