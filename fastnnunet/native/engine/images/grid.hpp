// Where the voxels of an image are, as ITK has it: axes x to the left, y to the back, z to the head of the patient
// (LPS).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "nifti.hpp"

namespace fastnnunet::images {

struct Grid {
    int axes = 3;
    std::array<double, 4> spacing{}, origin{};  // of the first `axes`, mm
    std::array<double, 16> direction{};         // axes x axes, row by row; a column for each axis of the image

    double& cosine(int row, int column) { return direction[row * axes + column]; }
    double cosine(int row, int column) const { return direction[row * axes + column]; }
};

// A grid of identity
Grid plain_grid(int axes);

// Turns negative spacings into axes that run the other way, and -0.0 into 0.0. Throws ImageError when a spacing is no
// length, a number is none, or the axes do not span space.
void settle(Grid& grid, const std::string& path);

// What ITK makes of a NIfTI header. Throws ImageError when that defines no axes at right angles to each other, or more
// than four axes.
Grid itk_grid(const NiftiHeader& header, const std::string& path);

// The 352 bytes that ITK writes before the voxels of a label map with two or three axes.
std::vector<std::uint8_t> itk_nifti_header(const Grid& grid, const std::vector<std::int64_t>& sizes_xyz,
                                           int voxel_bytes);

// Another order of three axes: axis i of the result is axis from[i], which runs the other way where flipped[i].
struct Turn {
    std::array<int, 3> from{0, 1, 2};
    std::array<bool, 3> flipped{};

    bool is_none() const { return from == std::array<int, 3>{0, 1, 2} && flipped == std::array<bool, 3>{}; }
};

// The patient's axis (0, 1, 2: left, back, head) that each axis of the image is nearest to, and whether it runs along
// it or against it.
struct Orientation {
    std::array<int, 3> axis{};
    std::array<bool, 3> against{};
};

Orientation orientation_of(const Grid& grid);
Turn turn_between(const Orientation& from, const Orientation& to);
// The grid after a turn; `sizes_xyz` are those before it.
Grid turned(const Grid& grid, const Turn& turn, const std::array<std::int64_t, 3>& sizes_xyz);

// Voxels of `bytes` each, x fastest, in other axes.
void turn_voxels(const void* from, const std::array<std::int64_t, 3>& sizes_xyz, int bytes, const Turn& turn, void* to);
std::array<std::int64_t, 3> turned_sizes(const std::array<std::int64_t, 3>& sizes_xyz, const Turn& turn);

}  // namespace fastnnunet::images
