#include "itk_files.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dicom/series.hpp"
#include "image.hpp"
#include "nifti.hpp"
#include "text.hpp"
#include "text_headers.hpp"

namespace fastnnunet::images {
namespace {

constexpr std::int64_t kLongestAxis = 32767;  // what a header of the first version counts to

[[noreturn]] void not_nifti(const std::string& path, const char* why) {
    throw ImageError("cannot read " + path + ": " + why + "\nexpected an image that SimpleITK can read");
}

// ITK opens names in small letters or in capitals, and takes a file to be compressed by its name alone.
void check_name(const NiftiFile& file) {
    const std::string name = name_of(file.path()), lower = lowered(name);
    for (const char* ending : {".nii.gz", ".nii", ".hdr", ".img.gz", ".img"}) {
        if (!ends_with(lower, ending)) continue;
        const std::string own = name.substr(name.size() - std::string(ending).size());
        std::string capitals = own;
        for (char& c : capitals) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
        if (own != lowered(own) && own != capitals)
            not_nifti(file.path(), "its file ending has small letters and capitals");
        const bool says_packed = ends_with(ending, ".gz");
        if (file.packed() && !says_packed && !is_nifti_pair(name)) {
            not_nifti(file.path(), "it is compressed but not named so (.nii.gz)");
        }
        return;
    }
}

// How ITK takes voxels: whole numbers that are rescaled become float32 first; a slope of nothing is one.
Rescale itk_rescale(const NiftiHeader& header) {
    constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
    Rescale rescale;
    if (header.is_analyze) return rescale;
    rescale.slope = std::isfinite(header.slope) ? header.slope : 0;
    rescale.intercept = std::isfinite(header.intercept) ? header.intercept : 0;
    if (std::fabs(rescale.slope) < kEpsilon) rescale.slope = 1;
    rescale.on = std::fabs(rescale.slope - 1) > kEpsilon || std::fabs(rescale.intercept) > kEpsilon;
    rescale.through_float = true;
    return rescale;
}

// Axes of one voxel beyond the third are none; of images of vectors of one number it is the sizes that tell.
NiftiHeader with_itks_axes(NiftiHeader header, const std::string& path) {
    auto& sizes = header.sizes_xyz;
    constexpr int kGeneralMatrix = 1004, kSymmetricMatrix = 1005, kDisplacement = 1006, kVector = 1007;
    if (header.intent == kGeneralMatrix || header.intent == kSymmetricMatrix) {
        not_nifti(path, "it holds matrices, expected one real number per voxel");
    }
    if (header.intent == kDisplacement || header.intent == kVector) {
        const std::int64_t values = sizes.size() > 4 ? sizes[4] : 1;
        if (values != 1) {
            throw ImageError(path + " has " + std::to_string(values) + " value(s) per voxel, expected one real number; "
                             "make a file of each channel");
        }
        sizes.resize(4, 1);
        while (sizes.size() > 1 && sizes.back() == 1) sizes.pop_back();
    } else {
        while (sizes.size() > 3 && sizes.back() == 1) sizes.pop_back();
    }
    if (sizes.size() < 2 || sizes.size() > 4) {
        throw ImageError(path + " has " + std::to_string(sizes.size()) +
                         " dimensions, expected a scalar image of 2 or 3 "
                         "dimensions, or 4 where the last is the channel");
    }
    return header;
}

ItkFile read_nifti(const std::string& path) {
    NiftiFile file(path);
    check_name(file);
    if (file.header().version != 1) not_nifti(path, "it is NIfTI-2, which ITK does not read");
    ItkFile out;
    out.volume = file.read(itk_rescale(file.header()));
    const NiftiHeader header = with_itks_axes(file.header(), path);
    out.volume.sizes_xyz = header.sizes_xyz;
    out.grid = itk_grid(header, path);
    return out;
}

}  // namespace

ItkFile read_itk(const std::string& path, const ReadOptions& options) {
    if (is_folder(path)) {
        std::vector<std::string> warnings;
        ItkFile file = read_series(path, options.series_uid, &warnings);
        file.warnings = std::move(warnings);
        return file;
    }
    if (is_nifti(path) || is_nifti_pair(path)) return read_nifti(path);
    if (is_metaimage(path)) return read_metaimage(path);
    if (is_nrrd(path)) return read_nrrd(path);
    File exists(path);  // says that it is missing before it says what it should be
    throw ImageError("cannot read " + path + ": its file ending is of no format that this engine reads\nexpected NIfTI "
                     "(.nii, .nii.gz), MetaImage (.mha, .mhd) or NRRD (.nrrd, .nhdr)");
}

void write_itk(const std::string& path, const Grid& grid, const std::vector<std::int64_t>& sizes_xyz,
               const SmallestLabels& labels) {
    if (is_nifti(path)) {
        if (*std::max_element(sizes_xyz.begin(), sizes_xyz.end()) > kLongestAxis) {
            throw ImageError("cannot write " + path + ": an axis is longer than " + std::to_string(kLongestAxis) +
                             " voxels, which NIfTI has no room for");
        }
        const auto header = itk_nifti_header(grid, sizes_xyz, labels.get().bytes);
        const Packing packing = ends_with(lowered(path), ".gz") ? Packing::gzip : Packing::none;
        write_file(path, labels.bytes_after(header, packing));
        return;
    }
    if (is_metaimage(path)) return write_metaimage(path, grid, sizes_xyz, labels);
    if (is_nrrd(path)) return write_nrrd(path, grid, sizes_xyz, labels);
    throw ImageError("cannot write " + path +
                     ": its file ending is of no format that this engine writes; expected NIfTI "
                     "(.nii, .nii.gz), MetaImage (.mha, .mhd) or NRRD (.nrrd, .nhdr)");
}

}  // namespace fastnnunet::images
