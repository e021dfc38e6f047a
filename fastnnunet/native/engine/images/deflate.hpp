// Compressing label maps: long runs, and rows like the rows before them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stored.hpp"

namespace fastnnunet::images {

// `header` and `size` bytes of voxels behind it as a gzip file of one member, or a zlib stream. Voxels are searched for
// repetitions at two distances alone, that of a voxel and that of a row (bytes), which takes a fraction of the time of
// a general search and finds what is in a label map.
std::vector<std::uint8_t> deflated(const std::vector<std::uint8_t>& header, const std::uint8_t* voxels,
                                   std::size_t size, Packing packing, std::size_t voxel_bytes, std::size_t row_bytes);

}  // namespace fastnnunet::images
