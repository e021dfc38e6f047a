// Tiles of one pass over small axes; the numbers are worked out by hand.
#include "core/tiles.hpp"

#include <stdexcept>

#include "check.hpp"

using namespace fastnnunet;

TEST_CASE("an axis in the middle of its frame, from one tile to the smallest") {
    const TileAxis axis{10, 8, 4, 2, 1, {}};
    CHECK(axis.frame() == 12);
    const std::vector<Cut> cuts = axis.cuts();
    CHECK(cuts.size() == 2);
    CHECK(cuts[0].tile == 12);
    CHECK(cuts[0].kept == Sizes({0, 10}));
    CHECK(cuts[0].before == Sizes{1});
    // two tiles of 8 from 0 and 4 share 4 to 8: the first is kept up to 6 of the frame, 5 of the image
    CHECK(cuts[1].tile == 8);
    CHECK(cuts[1].starts == Sizes({0, 4}));
    CHECK(cuts[1].kept == Sizes({0, 5, 10}));
    CHECK(cuts[1].computed() == 16);
}

TEST_CASE("a tile that would hold nothing but zeros is left out") {
    const TileAxis axis{1, 16, 4, 0, 1, 4};
    const std::vector<Cut> cuts = axis.cuts();
    CHECK(cuts.size() == 1);
    // zeros: 7 before, 8 after; the voxel lies in the second of four tiles
    CHECK(cuts[0].starts == Sizes{4});
    CHECK(cuts[0].kept == Sizes({0, 1}));
}

TEST_CASE("shifts lie parts of the stride further on") {
    const TileAxis axis{8, 4, 4, 0, 2, {}};
    CHECK(axis.offsets() == Sizes({0, 2}));
    CHECK(axis.frame() == 12);
    CHECK(axis.cuts()[0].before == Sizes({1, 3}));
}

TEST_CASE("the fewest voxels that a limit allows") {
    const TileAxis plane{1, 1, 1, 0, 1, {}}, axis{10, 8, 4, 2, 1, {}};
    const TileAxes axes{plane, axis, axis};
    const TileCost voxels = [](const Index& tile) { return tile[0] * tile[1] * tile[2]; };
    CHECK(fewest_tiles(axes, voxels, 144)->grid() == Index{1, 1, 1});
    CHECK(fewest_tiles(axes, voxels, 143)->tile() == Index{1, 12, 8});
    CHECK(fewest_tiles(axes, voxels, 64)->grid() == Index{1, 2, 2});
    CHECK(!fewest_tiles(axes, voxels, 63));
    CHECK(*least_cost(axes, voxels) == 64);
    CHECK(*smaller_limit(axes, voxels, 1000) == 72);  // half of 144
    CHECK(!smaller_limit(axes, voxels, 72));          // in which the smallest alone fits
    CHECK(!smaller_limit(axes, voxels, 63));
    const TileAxis short_of{10, 8, 4, 2, 1, 4};
    CHECK(!least_cost({plane, axis, short_of}, voxels));
    const Tiling tiling = *fewest_tiles(axes, voxels, 64);
    CHECK(tiling.kept({0, 1, 0}).start == Index{0, 5, 0});
    CHECK(tiling.kept({0, 1, 0}).stop == Index{1, 10, 5});
    CHECK(tiling.origin({0, 1, 0}, 0) == Index{0, 3, -1});
    CHECK_THROWS_AS(tiling.kept({0, 2, 0}), std::out_of_range);
}
