// Labels of an image that was read are written, and must be read as they were written.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "images/image.hpp"

namespace fuzz {

inline void check_round_trip(const fastnnunet::images::Image& image, const char* reader, const std::string& path) {
    const std::array<std::int64_t, 3> shape{image.shape_CZYX[1], image.shape_CZYX[2], image.shape_CZYX[3]};
    std::vector<std::uint8_t> labels(static_cast<std::size_t>(shape[0] * shape[1] * shape[2]));
    for (std::size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<std::uint8_t>(image.voxels_CZYX[i] > 7);
    try {
        fastnnunet::images::write_labels(path, {labels.data(), shape}, *image.header);
    } catch (const fastnnunet::images::ImageError&) {
        return;  // too long an axis, for instance
    }
    const fastnnunet::images::Image again = fastnnunet::images::read_segmentation(path, reader);
    if (!std::equal(shape.begin(), shape.end(), again.shape_CZYX.begin() + 1)) std::abort();
    for (std::size_t i = 0; i < labels.size(); ++i) {
        if (again.voxels_CZYX[i] != static_cast<float>(labels[i])) std::abort();
    }
}

}  // namespace fuzz
