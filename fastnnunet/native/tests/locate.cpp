// Blocks, boxes and parts of small images; the numbers are worked out by hand.
#include "core/locate.hpp"

#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "core/half.hpp"

using namespace fastnnunet;

TEST_CASE("means of blocks, smaller ones at the end") {
    const std::vector<float> image{1, 2, 3, 4, 5, 6};  // one plane of 2 x 3
    std::vector<float> means(2);
    const Volumes<const float> from{image.data(), 1, 6, {1, 2, 3}, {6, 3}};
    const Volumes<float> to{means.data(), 1, 2, {1, 1, 2}, {2, 2}};
    block_means(from, {4, 2, 2}, to, 1);
    CHECK(means == std::vector<float>({3, 4.5}));  // of 1 2 4 5, and of 3 6
    CHECK_THROWS_AS(block_means(from, {1, 2, 2}, {means.data(), 1, 2, {1, 2, 1}, {2, 1}}, 1), std::invalid_argument);
}

TEST_CASE("a box around the blocks above the threshold, in voxels of the image") {
    std::vector<Half> logits(2 * 4, to_half(0));
    const Volumes<const Half> of_blocks{logits.data(), 2, 4, {1, 2, 2}, {4, 2}};
    const Index factor{2, 3, 2}, shape{2, 5, 3};
    CHECK(!seen_box(of_blocks, 0.5, factor, shape));  // as likely as not is not above
    logits[4 + 3] = to_half(1);                       // the last block
    const Box box = *seen_box(of_blocks, 0.7, factor, shape);  // sigmoid(1) is 0.73
    CHECK(box.start == Index{0, 3, 2});
    CHECK(box.stop == shape);
    CHECK(!seen_box(of_blocks, 0.74, factor, shape));
}

TEST_CASE("a margin in mm, as far as the image goes") {
    const Box box{{5, 5, 5}, {8, 8, 8}};
    const Box wider = with_margin(box, 3, {1, 2, 10}, {10, 10, 10});
    CHECK(wider.start == Index{2, 3, 4});
    CHECK(wider.stop == Index{10, 10, 9});
    CHECK(with_margin(box, 0.3, {0.1, 0.1, 0.1}, {20, 20, 20}).start == Index{2, 2, 2});
    CHECK(with_margin(box, 1e6, {1e-9, 1, 1}, {20, 20, 20}).stop == Index{20, 20, 20});
}

TEST_CASE("chunks of an image around those of its part") {
    const ImagePart part{{-2, 3, 1}, {8, 4, 4}};
    const Index shape{10, 9, 6};
    const std::array<Sizes, 3> bounds = part.bounds({Sizes{0, 1, 5, 8}, Sizes{0, 4}, Sizes{0, 4}}, shape);
    CHECK(bounds[0] == Sizes({0, 3, 6, 10}));  // -2 and -1 are before the image
    CHECK(bounds[1] == Sizes({0, 3, 7, 9}));
    CHECK(bounds[2] == Sizes({0, 6}));
    CHECK(!part.shared({{0, 0, 0}, {1, 4, 4}}, shape));
    const auto shared = part.shared({{1, 0, 0}, {5, 4, 4}}, shape);
    CHECK(shared->in_image.start == Index{0, 3, 1});
    CHECK(shared->in_image.stop == Index{3, 7, 5});
    CHECK(shared->in_box.start == Index{1, 0, 0});
    CHECK(shared->in_box.stop == Index{4, 4, 4});
}

TEST_CASE("a patch around a box, within the image") {
    const ImagePart part = window_part({10, 10, 3}, {4, 4, 4}, {{1, 9, 0}, {7, 10, 1}});
    CHECK(part.origin == Index{1, 6, 0});
    CHECK(part.size == Index{6, 4, 3});
}
