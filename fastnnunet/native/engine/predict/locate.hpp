// Locate, then look: a tiny network finds a box in the image at a coarse spacing, the fine network sees that alone.
// As fastnnunet/runtime/locate.py; what is decided is the core's, core/locate.hpp.
#pragma once

#include <memory>
#include <vector>

#include "bundle/bundle.hpp"
#include "core/locate.hpp"
#include "predict/ways.hpp"

namespace fastnnunet::engine {

// The network that finds where to predict.
struct Locating {
    Locator rules;
    std::vector<double> spacing_mm;  // of the preprocessed image
    Tiles tiles;
    std::unique_ptr<Network> network;
    std::unique_ptr<Way> way;  // of its own images
};

// Logits outside a part, of each head: of 10 million voxels there one would be foreground.
std::vector<Half> background_logits(std::int64_t heads, bool has_regions);

// A way to predict the part of a preprocessed image around what the locator sees, the rest being background; none where
// it sees nothing, or the part is as large as the image. Refers to `way`.
std::unique_ptr<Way> located(const Locating& locating, const Volumes<const float>& data, const Way& way,
                             const std::vector<Half>& background, int threads);

}  // namespace fastnnunet::engine
