// Files that ITK reads and writes for SimpleITKIO: NIfTI, MetaImage and NRRD, by their names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "grid.hpp"
#include "reader.hpp"

namespace fastnnunet::images {

struct ItkFile {
    Volume volume;
    Grid grid;
    std::vector<std::string> warnings;
};

// Throws ImageError when the file is missing, damaged, truncated or no scalar image, or its geometry is none.
ItkFile read_itk(const std::string& path, const ReadOptions& options);

// Writes a label map of two or three axes in the format of the name's ending, with the header that ITK writes.
void write_itk(const std::string& path, const Grid& grid, const std::vector<std::int64_t>& sizes_xyz,
               const SmallestLabels& labels);

}  // namespace fastnnunet::images
