// Label maps of a few voxels.
#include "core/label_maps.hpp"

#include <stdexcept>
#include <vector>

#include "check.hpp"

using namespace fastnnunet;

namespace {

template <class Label>
Volume<Label> plane(std::vector<Label>& values, std::int64_t height, std::int64_t width) {
    return {values.data(), {1, height, width}, {height * width, width}};
}

}  // namespace

TEST_CASE("the largest component of several labels taken as one, ties stay") {
    std::vector<std::uint8_t> map{1, 2, 0, 1, 0, 0, 0, 0, 3};
    keep_largest(plane(map, 3, 3), {1, 2, 999, -1}, 7, 1);
    CHECK(map == std::vector<std::uint8_t>({1, 2, 0, 1, 0, 0, 0, 0, 3}));  // all of 1 and 2 hang together
    map = {1, 0, 2, 0, 0, 2, 1, 0, 0};
    keep_largest(plane(map, 3, 3), {1, 2}, 7, 1);
    CHECK(map == std::vector<std::uint8_t>({7, 0, 2, 0, 0, 2, 7, 0, 0}));
    map = {1, 0, 1};
    keep_largest(plane(map, 1, 3), {1}, 7, 1);
    CHECK(map == std::vector<std::uint8_t>({1, 0, 1}));
}

TEST_CASE("small components go, each label by itself") {
    std::vector<std::uint16_t> map{300, 300, 0, 300, 1, 1};
    remove_small(plane(map, 1, 6), 2, 1);
    CHECK(map == std::vector<std::uint16_t>({300, 300, 0, 0, 1, 1}));
}

TEST_CASE("holes of a single plane, but not what another label covers") {
    std::vector<std::uint8_t> map{1, 1, 1, 1,  //
                                  1, 0, 2, 1,  //
                                  1, 1, 1, 1};
    fill_label_holes(plane(map, 3, 4), {1}, 1);
    CHECK(map == std::vector<std::uint8_t>({1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1}));
    map = {1, 1, 1, 1, 0, 0, 1, 1, 1};  // open at its border
    fill_label_holes(plane(map, 3, 3), {1}, 1);
    CHECK(map[4] == 0);
}

TEST_CASE("labels are resampled by their indicators, ties to the nearest neighbour") {
    const std::vector<std::int32_t> labels{-1, 5, 5, 0};
    std::vector<std::int32_t> out(8, 99);
    const ResamplePlan plan{Convention::scipy, {0, 0, 1}, {}, Clip::none, {1, 1, 8}};
    resample_labels({labels.data(), {1, 1, 4}, {4, 4}}, {out.data(), {1, 1, 8}, {8, 8}}, plan, 1);
    CHECK(out == std::vector<std::int32_t>({-1, -1, 5, 5, 5, 5, 0, 0}));
    CHECK_THROWS_AS((resample_labels({labels.data(), {1, 1, 4}, {4, 4}}, {out.data(), {1, 1, 4}, {4, 4}}, plan, 1), 0),
                    std::invalid_argument);
}
