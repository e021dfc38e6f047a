// PNG pictures, as Pillow has their pixels. Format: https://www.w3.org/TR/png-3/
#pragma once

#include <string>

#include "../reader.hpp"

namespace fastnnunet::images {

// Planes of one, three (RGB) or four (RGBA) channels. Throws ImageError when the picture is damaged, truncated,
// animated or has channels of another number.
Volume read_png(const std::string& path);

// A label map of one plane as a grey picture of 8 or 16 bits.
void write_png(const std::string& path, const SmallestLabels& labels);

}  // namespace fastnnunet::images
