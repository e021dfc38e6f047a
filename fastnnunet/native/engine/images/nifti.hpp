// NIfTI files: what their header says, checked before anything is done with it, and their voxels.
// Formats: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h, https://nifti.nimh.nih.gov/pub/dist/doc/nifti2.h
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stored.hpp"
#include "voxels.hpp"

namespace fastnnunet::images {

// What is read of either version, numbers as they are stored
struct NiftiHeader {
    int version = 1;
    bool big_endian = false;
    bool is_analyze = false;  // a pair of files without the magic; it has no orientation
    int datatype = 0;
    std::vector<std::int64_t> dim;        // dim[0] and as many as that counts
    std::vector<std::int64_t> sizes_xyz;  // those axes; a size of 0 beyond the third is 1
    std::int64_t start = 0;               // of the voxels
    double slope = 0, intercept = 0;
    std::array<double, 8> pixdim{};
    int qform_code = 0, sform_code = 0;
    std::array<double, 6> qform{};   // quaternion (b, c, d), offset
    std::array<double, 12> sform{};  // rows
    int units = 0, intent = 0;
    double time_offset = 0;

    int axes() const { return static_cast<int>(sizes_xyz.size()); }
};

// Whether a file is named as a single-file NIfTI image, or as one half of an image in two files (NIfTI or Analyze)
bool is_nifti(const std::string& path);
bool is_nifti_pair(const std::string& path);

class NiftiFile {
public:
    // Reads and checks the header: sizes are positive, geometry and scaling are finite, voxels are real numbers.
    // Throws ImageError.
    explicit NiftiFile(const std::string& path);

    const NiftiHeader& header() const { return header_; }
    bool packed() const { return voxel_stored_->packed(); }
    const std::string& path() const { return path_; }

    // Throws ImageError when the voxels are not as many as the header says.
    Volume read(const Rescale& rescale);

private:
    std::string path_;
    NiftiHeader header_;
    std::unique_ptr<File> header_file_, voxel_file_;
    std::unique_ptr<Stored> header_stored_, voxel_stored_;  // the latter of both where there is one file
};

}  // namespace fastnnunet::images
