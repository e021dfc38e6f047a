// Window grid, padding and chunks; the numbers are worked out by hand.
#include "core/window.hpp"

#include <stdexcept>

#include "check.hpp"

using namespace fastnnunet;

TEST_CASE("an odd voxel of padding goes above") {
    CHECK(centre_padding(5, 8).below == 1);
    CHECK(centre_padding(5, 8).above == 2);
    CHECK(centre_padding(3, 7).below == 2);
    CHECK(centre_padding(3, 7).above == 2);
    CHECK(centre_padding(9, 8).below == 0);
    CHECK(centre_padding(9, 8).above == 0);
}

TEST_CASE("steps are spread evenly and rounded half to even") {
    // nnU-Net's own example: steps of at most 32 over 46 voxels of room make three tiles, 23 apart
    CHECK(tile_starts({110}, {64}, 0.5) == std::vector<Sizes>{{0, 23, 46}});
    // 5 voxels of room, steps of at most 3: two steps of 2.5
    CHECK(tile_starts({11}, {6}, 0.5) == std::vector<Sizes>{{0, 2, 5}});
    // 7 of room, steps of at most 4: two steps of 3.5
    CHECK(tile_starts({15}, {8}, 0.5) == std::vector<Sizes>{{0, 4, 7}});
    CHECK(tile_starts({8, 4}, {8, 2}, 1.0) == std::vector<Sizes>{{0}, {0, 2}});
}

TEST_CASE("a grid that cannot be is refused") {
    CHECK_THROWS_AS(tile_starts({8}, {4}, 0.0), std::invalid_argument);
    CHECK_THROWS_AS(tile_starts({8}, {4}, 1.5), std::invalid_argument);
    CHECK_THROWS_AS(tile_starts({3}, {4}, 0.5), std::invalid_argument);
    CHECK_THROWS_AS(tile_starts({8}, {0}, 0.5), std::invalid_argument);
    CHECK_THROWS_AS(tile_starts({8, 8}, {4}, 0.5), std::invalid_argument);
}

TEST_CASE("a small image lies in the middle of a padded one") {
    const ChunkedWindow window = ChunkedWindow::of_chunks({4, 5, 6}, {4, 8, 4}, 0.5, {4, 5, 6});
    CHECK(window.starts() == ChunkedWindow::PerAxis{Sizes{0}, Sizes{-1}, Sizes{0, 2}});
    CHECK(window.tiles() == 2);
    CHECK(window.tile_start(1) == Index{0, -1, 2});
    const ChunkedWindow::Overlap shared = window.overlap(1, {0, 0, 0});
    CHECK(shared.in_chunk.start == Index{0, 0, 2});
    CHECK(shared.in_chunk.stop == Index{4, 5, 6});
    CHECK(shared.in_tile.start == Index{0, 1, 0});
    CHECK(shared.in_tile.stop == Index{4, 6, 4});
    CHECK(window.peak_voxels() == 4 * 5 * 6);
    CHECK_THROWS_AS(window.tile_start(2), std::out_of_range);
    CHECK_THROWS_AS(window.chunk({0, 0, 1}), std::out_of_range);
}

TEST_CASE("a patch of two axes visits every slice") {
    const ChunkedWindow window = ChunkedWindow::of_chunks({3, 6, 4}, {4, 4}, 0.5, {2, 6, 4});
    CHECK(window.tile() == Index{1, 4, 4});
    CHECK(window.tiles() == 6);
    CHECK(window.tile_start(3) == Index{1, 2, 0});
    CHECK(window.grid() == Index{2, 1, 1});
    CHECK(window.tiles_per_chunk() == std::vector<std::int32_t>{4, 2});
    CHECK_THROWS_AS(ChunkedWindow::of_chunks({3, 6, 4}, {4}, 0.5, {2, 6, 4}), std::invalid_argument);
}

TEST_CASE("tiles touch the chunks they reach") {
    // along z tiles [0, 4) [2, 6) [4, 8), chunks [0, 3) [3, 6) [6, 8)
    const ChunkedWindow window = ChunkedWindow::of_chunks({8, 4, 4}, {4, 4, 4}, 0.5, {3, 4, 4});
    CHECK(window.chunks_of(0) == std::vector<Index>{{0, 0, 0}, {1, 0, 0}});
    CHECK(window.chunks_of(1) == std::vector<Index>{{0, 0, 0}, {1, 0, 0}});
    CHECK(window.chunks_of(2) == std::vector<Index>{{1, 0, 0}, {2, 0, 0}});
    CHECK(window.tiles_per_chunk() == std::vector<std::int32_t>{2, 3, 1});
    CHECK(window.peak_voxels() == 6 * 16);            // chunks 0 and 1, or 1 and 2
    CHECK(window.peak_voxels(1) == 2 * 4 * 5 * 4);    // both with a plane and a row more
}

TEST_CASE("streamed chunks begin and end where tiles do, whole along x") {
    const ChunkedWindow window = ChunkedWindow::streamed({8, 6, 9}, {4, 4, 4}, 0.5);
    CHECK(window.bounds() == ChunkedWindow::PerAxis{Sizes{0, 2, 4, 6, 8}, Sizes{0, 2, 4, 6}, Sizes{0, 9}});
    CHECK(window.chunk({3, 1, 0}).start == Index{6, 2, 0});
    CHECK(window.chunk({3, 1, 0}).stop == Index{8, 4, 9});
}
