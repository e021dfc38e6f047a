// A DICOM series as one image: found in a folder, refused where its slices form no grid.
//
// Uncompressed pixels of CT, PET and unscaled images are read here; all others by GDCM, in builds that have it
// (-DFASTNNUNET_GDCM=ON).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "../itk_files.hpp"
#include "head.hpp"

namespace fastnnunet::images {

// Slices in their order, and what was left out
struct DicomSlices {
    std::vector<std::pair<std::string, DicomHead>> slices;  // path, head
    std::vector<std::string> notes;
};

// `uid`: which series is meant where there are several. Throws ImageError when the folder holds no image series,
// several and no `uid` says which, or not that one; and when a file of the series is damaged.
DicomSlices find_slices(const std::string& folder, const std::string& uid);

// Throws ImageError unless the slices are of one kind and size, straight above each other and evenly spaced.
void check_slices(const std::string& folder, const DicomSlices& series);

// Mean distance of two or more slices of a grid, mm
double slice_spacing(const DicomSlices& series);

// Voxels with rescale slope and intercept applied, and ITK's grid. Throws ImageError.
ItkFile read_series(const std::string& folder, const std::string& uid, std::vector<std::string>* warnings);

// One slice by GDCM: its pixels into `into` (rows x columns floats), and its spacing (x, y, z) as ITK's reader has it.
// Throws ImageError; in builds without GDCM one that says so.
std::array<double, 3> read_slice_by_gdcm(const std::string& path, const DicomHead& head, float* into);

}  // namespace fastnnunet::images
