// Locate, then look: a tiny network sees an image in blocks and says in which of them the foreground is; the fine
// network sees a part of the image around them alone, and the rest is background.
//
// A part lies in the voxels of its image. It may reach into the zeros around the image, where the network pads.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "core/view.hpp"
#include "core/window.hpp"

namespace fastnnunet {

// How many blocks of `factor` voxels there are along each axis; those at the end may be smaller.
Index coarse_shape(const Index& shape, const Index& factor);

// The mean of each block, a sum in float64 rounded once. `means` has the image's channels and its coarse shape.
void block_means(const Volumes<const float>& image, const Index& factor, const Volumes<float>& means, int threads);

// Around the blocks where softmax gives the second of two heads more than `threshold`, in voxels of the image of that
// shape; none where it is nowhere. `logits` are those of its blocks.
std::optional<Box> seen_box(const Volumes<const Half>& logits, double threshold, const Index& factor,
                            const Index& shape);

// So much more on every side, as far as the image goes. A margin that is a whole number of voxels stays it.
Box with_margin(const Box& box, double margin_mm, const std::array<double, 3>& spacing_mm, const Index& shape);

// What to predict by itself for the voxels of a box: where it begins, and its size.
struct ImagePart {
    Index origin, size;

    std::int64_t voxels() const { return size[0] * size[1] * size[2]; }

    // Where chunks of the image begin and end, and where its last one does: those of the part as far as they lie in the
    // image, and what is before and behind them; whole along x.
    std::array<Sizes, 3> bounds(const std::array<Sizes, 3>& of_part, const Index& shape) const;

    // What a box of the part and the image share, in the image and in the box; none where that is nothing.
    struct Shared {
        Box in_image, in_box;
    };
    std::optional<Shared> shared(const Box& of_part, const Index& shape) const;
};

// Of the sliding window: the box, or a patch around it; no longer than the image.
ImagePart window_part(const Index& shape, const Sizes& patch, const Box& box);

}  // namespace fastnnunet
