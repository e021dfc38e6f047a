// What nnU-Net's reader classes have in common.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "image.hpp"
#include "linear.hpp"
#include "voxels.hpp"

namespace fastnnunet::images {

// What a reader keeps of an image: how its label maps are written.
class Header {
public:
    virtual ~Header() = default;
    virtual void write(const std::string& path, const Labels& labels) const = 0;
    // Index (x, y, z, 1) of a voxel as it was read to its centre in mm, LPS
    virtual Affine affine() const { return identity<4>(); }
};

// A value of a file's geometry that all channels must share.
struct Shared {
    std::string name;
    std::vector<double> values;
    std::string text;
};

// One file as its reader has it
struct Channel {
    Volume volume;                         // three axes, or four where the last is a channel
    bool has_channels = false;             // whether there are four
    std::array<double, 3> spacing_ZYX{};
    std::vector<Shared> shared;            // besides the shape
    std::vector<std::string> warnings;
    std::shared_ptr<const Header> header;  // of the first file alone it is used
};

// The image of all files, of which `read_one` reads each, side by side on `threads` of them (0: as many as there are
// cores). Throws ImageError: that of the first file that has one; when channels do not fit together, or voxels are NaN
// or infinite, or there are none.
Image read_channels(const std::vector<std::string>& paths, int threads,
                    const std::function<Channel(const std::string&)>& read_one);

// Labels in nnU-Net's type: 8 bits where all are below 255. The memory of `labels` where they are so already.
class SmallestLabels {
public:
    explicit SmallestLabels(const Labels& labels);

    const Labels& get() const { return labels_; }
    // As a file has them, lowest byte first, behind a header
    std::vector<std::uint8_t> bytes_after(const std::vector<std::uint8_t>& header, Packing packing) const;

private:
    std::vector<std::uint8_t> other_;  // of the other type
    Labels labels_;
};

// Writes a file as a whole: to a sibling that is renamed when it is complete. Throws WriteError.
void write_file(const std::string& path, const std::vector<std::uint8_t>& content);

using Reader = std::function<Image(const std::vector<std::string>&, const ReadOptions&, bool is_segmentation)>;
Reader sitk_reader(bool reorient);
Reader nibabel_reader(bool reorient);
Reader natural_reader();

}  // namespace fastnnunet::images
