// Images as nnU-Net's reader classes give them, and label maps as they write them.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastnnunet::images {

// What a user can mend. The message says what was wrong, got, expected and how to mend it, as the Python runtime does.
struct ImageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A file that cannot be written: no room, no permission, no such folder.
struct WriteError : ImageError {
    using ImageError::ImageError;
};

// What a reader keeps of a file for writing label maps: of each kind of reader a class of its own.
class Header;

struct Image {
    std::array<std::int64_t, 4> shape_CZYX{};
    std::shared_ptr<float[]> voxels_CZYX;  // contiguous, every one of them finite
    std::array<double, 3> spacing_ZYX{};   // mm, nnU-Net's properties["spacing"]
    std::shared_ptr<const Header> header;
    std::vector<std::string> warnings;  // whole sentences for the log

    std::int64_t size() const { return shape_CZYX[0] * shape_CZYX[1] * shape_CZYX[2] * shape_CZYX[3]; }
};

struct ReadOptions {
    std::string series_uid;  // SeriesInstanceUID: which one of a DICOM folder that holds several
    int threads = 0;         // that read channels side by side; 0: as many as there are cores
};

// Whether there is a reader of that nnU-Net class name; `known_readers` names them all, with commas between.
bool has_reader(const std::string& reader);
std::string known_readers();

// Whether some file directly in `folder` is DICOM, whatever its name.
bool is_dicom_folder(const std::string& folder);

// The channels of one image, a file or a folder of DICOM slices each; names are UTF-8.
// `reader`: nnU-Net's class name, such as SimpleITKIO. Throws ImageError.
Image read_image(const std::vector<std::string>& paths, const std::string& reader, const ReadOptions& options = {});

// A label map, whose name has no channel number, in the axes of `read_image` (one channel). Throws ImageError.
Image read_segmentation(const std::string& path, const std::string& reader, const ReadOptions& options = {});

// A label map on the grid of the image that `header` is of, contiguous; uint8 or uint16.
struct Labels {
    Labels(const std::uint8_t* voxels_ZYX, const std::array<std::int64_t, 3>& shape_ZYX);
    Labels(const std::uint16_t* voxels_ZYX, const std::array<std::int64_t, 3>& shape_ZYX);

    const void* voxels_ZYX;
    int bytes;  // of a voxel: 1 or 2
    std::array<std::int64_t, 3> shape_ZYX;

    std::int64_t size() const { return shape_ZYX[0] * shape_ZYX[1] * shape_ZYX[2]; }
};

// Index (x, y, z, 1) of a voxel of `read_image` to its centre in mm, LPS. Of pictures, the identity.
std::array<std::array<double, 4>, 4> affine_of(const Header& header);

// Writes a label map with the geometry of the file that was read, in nnU-Net's type (uint8 where all labels are below
// 255, else uint16) and the format of the name's ending: into a sibling first, so `path` is whole or as it was.
// Throws ImageError, WriteError.
void write_labels(const std::string& path, const Labels& labels, const Header& header);

}  // namespace fastnnunet::images
