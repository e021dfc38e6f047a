// Where the tiles of a sliding window lie, as nnU-Net 2.8 places them, and the chunks in which its result leaves.
//
// Tiles are visited in C order, which decides the rounding of float16 sums. A chunk is complete once the last tile that
// reaches it has been added, so memory need hold only the chunks that are begun and not complete: about half a tile's
// depth of the image, whatever the image's size.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/view.hpp"

namespace fastnnunet {

using Sizes = std::vector<std::int64_t>;

// Voxels to add before and after an axis so that it reaches `least`; the odd one goes after.
struct Padding {
    std::int64_t below, above;
};
Padding centre_padding(std::int64_t size, std::int64_t least);

// The first voxel of every tile, per axis: steps of `step_size` tiles at most, spread evenly, so that the first tile
// starts at 0 and the last one ends at the border.
// Throws std::invalid_argument when a tile is larger than the image (pad first) or the step is outside (0, 1].
std::vector<Sizes> tile_starts(const Sizes& image, const Sizes& tile, double step_size);

// Tiles and chunks of one image, each axis cut by itself.
class ChunkedWindow {
public:
    using PerAxis = std::array<Sizes, 3>;

    // A patch of two axes visits every slice. An image smaller than the patch is thought to lie in the middle of a
    // padded one: its tiles start at negative voxels. Throws as `tile_starts`.
    //
    // Chunks of one size, smaller at the end of the image.
    static ChunkedWindow of_chunks(const Index& shape, const Sizes& patch, double step_size, const Index& chunk);
    // Chunks that begin and end where tiles do along z and y, and are whole along x: each tile reaches all planes and
    // rows of a chunk or none, and no part of a chunk is held for the sake of another.
    static ChunkedWindow streamed(const Index& shape, const Sizes& patch, double step_size);

    const Index& shape() const { return shape_; }
    const Index& tile() const { return tile_; }
    const PerAxis& starts() const { return starts_; }  // of tiles, in voxels of the image
    const PerAxis& bounds() const { return bounds_; }  // where chunks begin and end, from 0 to the size of the image

    std::int64_t tiles() const;
    Index tile_start(std::int64_t number) const;  // throws std::out_of_range
    Index grid() const;                           // number of chunks per axis
    Box chunk(const Index& number) const;         // throws std::out_of_range

    // What a tile and a chunk share, counted from the first voxel of the chunk and from that of the tile.
    struct Overlap {
        Box in_chunk, in_tile;
    };
    Overlap overlap(std::int64_t tile, const Index& chunk) const;

    std::vector<Index> chunks_of(std::int64_t tile) const;  // numbers of the chunks it touches, in C order
    std::vector<std::int32_t> tiles_per_chunk() const;      // (grid) how many touch each
    // The most voxels that ever wait at once; each chunk with `margin` planes and rows more.
    std::int64_t peak_voxels(std::int64_t margin = 0) const;

private:
    struct Range {
        std::int64_t start, stop;
    };

    ChunkedWindow(const Index& shape, const Sizes& patch, double step_size);
    void bound(PerAxis bounds);
    Index position(std::int64_t tile) const;  // along each axis, of a tile

    Index shape_;
    Index tile_;
    PerAxis starts_;
    PerAxis bounds_;
    std::array<std::vector<Range>, 3> reach_;  // per axis and tile position: the chunks it touches
};

}  // namespace fastnnunet
