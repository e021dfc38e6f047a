// Tiles for a network whose output at a voxel depends on a halo around it alone: each voxel is kept from one of them.
//
// The image lies in a frame, zeros around it, whose lengths are multiples of the strides. Tiles of one size begin at
// multiples of the strides; two neighbours share at least the halo of both, and what is kept of them meets in the
// middle of what they share. At the border of the frame no halo is needed: there the network pads as it did in
// training.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "core/view.hpp"
#include "core/window.hpp"

namespace fastnnunet {

// The tiles along one axis.
struct Cut {
    std::int64_t length;  // of the frame
    std::int64_t tile;
    Sizes starts;  // of the tiles in the frame
    Sizes kept;    // of the image: what is kept of tile i begins at kept[i] and ends at kept[i + 1]
    Sizes before;  // for each shift: zeros of the frame before the image

    // Voxels along the axis that go through the network.
    std::int64_t computed() const { return tile * static_cast<std::int64_t>(starts.size()); }
};

// What tiles along an axis need.
struct TileAxis {
    std::int64_t size;      // of the image
    std::int64_t least;     // of the frame, a multiple of `multiple`
    std::int64_t multiple;  // 1 or more
    std::int64_t halo;
    std::int64_t shifts =
        1;  // times that the image is predicted, each another part of `multiple` further on in the frame
    std::optional<std::int64_t> most;  // the longest tile

    Sizes offsets() const;
    std::int64_t frame() const;
    Sizes before() const;  // for each shift: zeros of the frame before the image
    // A part of the image that holds [begin, end): where it begins, and its length, a multiple of `multiple`.
    //
    // It is no shorter than `least` and lies in the frame of the image (with one shift), so it may begin before the
    // image or end behind it. As an image of its own its voxels lie against `multiple` as they do in the whole image.
    std::pair<std::int64_t, std::int64_t> crop(std::int64_t begin, std::int64_t end) const;
    // From the largest tiles to the smallest, which compute no less; empty where none is short enough.
    std::vector<Cut> cuts() const;
};

using TileAxes = std::array<TileAxis, 3>;                         // z, y, x
using TileCost = std::function<std::int64_t(const Index& tile)>;  // by its lengths; grows with each

// Cuts along z, y and x.
struct Tiling {
    std::array<Cut, 3> cuts;

    Index tile() const;
    Index grid() const;
    std::int64_t shifts() const { return static_cast<std::int64_t>(cuts[0].before.size()); }
    Box kept(const Index& number) const;  // of a tile, in the image; throws std::out_of_range
    // Where a tile begins, in the image; below 0 where it begins in the zeros before it. Throws std::out_of_range.
    Index origin(const Index& number, std::int64_t shift) const;
};

// The tiling that computes the fewest voxels among those whose tile costs no more than `limit`. Of several the one of
// the fewest tiles; none where even the smallest tile costs more.
std::optional<Tiling> fewest_tiles(const TileAxes& axes, const TileCost& cost, std::int64_t limit);

// The limit to try next where a network found no memory for the tiles that `limit` lets it have: half of what such a
// tile costs, or what the smallest costs. None where it was the smallest.
std::optional<std::int64_t> smaller_limit(const TileAxes& axes, const TileCost& cost, std::int64_t limit);

// What the smallest tile costs; none where the longest tiles that are allowed are too short.
std::optional<std::int64_t> least_cost(const TileAxes& axes, const TileCost& cost);

}  // namespace fastnnunet
