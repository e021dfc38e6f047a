// What to resample how, and volumes resampled so; the numbers are worked out by hand.
#include "core/resample_plan.hpp"

#include <stdexcept>
#include <vector>

#include "check.hpp"

using namespace fastnnunet;

namespace {

const ResampleSpec kImage;                                   // cubic in plane, nearest between planes
const ResampleSpec kLogits{Convention::scipy, 1, 0, {}, 3};  // linear in plane
constexpr Spacing kCube{1, 1, 1};

template <class T>
Volume<T> whole(T* data, const Index& shape) {
    return {data, shape, {shape[1] * shape[2], shape[2]}};
}

std::vector<float> resampled(const std::vector<float>& values, const Index& shape, const ResamplePlan& plan) {
    std::vector<float> out(plan.shape_out[0] * plan.shape_out[1] * plan.shape_out[2]);
    resample(whole<const float>(values.data(), shape), whole(out.data(), plan.shape_out), plan, 1);
    return out;
}

}  // namespace

TEST_CASE("shapes are rounded half to even") {
    CHECK(resampled_shape({5, 7, 9}, {0.5, 0.5, 0.5}, kCube) == Index{2, 4, 4});  // of 2.5, 3.5, 4.5
    CHECK(resampled_shape({10, 10, 1}, {3, 0.1, 0.2}, kCube) == Index{30, 1, 0});
    CHECK(resampled_shape({1, 1, 1}, {1e300, 1, 1}, {1e-300, 1, 1})[0] == std::int64_t{1} << 53);
    CHECK_THROWS_AS(resampled_shape({1, 1, 1}, {0, 1, 1}, {0, 1, 1}), std::invalid_argument);
}

TEST_CASE("the coarse axis") {
    CHECK(coarse_axis({5, 1, 1}, kCube, {}, 3) == 0);
    CHECK(coarse_axis({1, 1, 4}, kCube, {}, 3) == 2);
    CHECK(coarse_axis({3, 1, 1}, kCube, {}, 3) == std::nullopt);        // 3 is not above 3
    CHECK(coarse_axis({3, 1, 1}, kCube, {}, 2) == 0);
    CHECK(coarse_axis(kCube, {1, 4, 1}, {}, 3) == 1);                   // of the target
    CHECK(coarse_axis({5, 1, 1}, {1, 6, 1}, {}, 3) == 0);               // the present spacing counts first
    CHECK(coarse_axis({5, 5, 1}, {1, 6, 1}, {}, 3) == std::nullopt);    // two are none
    CHECK(coarse_axis({1, 1, 2}, kCube, true, 3) == 2);                 // forced
    CHECK(coarse_axis({5, 1, 1}, {5, 1, 1}, false, 3) == std::nullopt);
}

TEST_CASE("a plan: orders, clipping and what may be made piece by piece") {
    CHECK(!plan_resampling(kImage, {4, 5, 6}, {4, 5, 6}, kCube, {1, 1, 1.05}));

    const auto isotropic = plan_resampling(kImage, {4, 5, 6}, {4, 7, 8}, kCube, kCube);
    CHECK(isotropic->orders == std::array<int, 3>{0, 3, 3});
    CHECK(!isotropic->separate_axis);
    CHECK(isotropic->clip == Clip::whole);
    CHECK(!isotropic->is_local());
    CHECK(isotropic->keeps_type());

    const auto coarse = plan_resampling(kImage, {4, 5, 6}, {8, 7, 8}, {5, 1, 1}, kCube);
    CHECK(coarse->orders == std::array<int, 3>{0, 3, 3});
    CHECK(coarse->separate_axis == 0);
    CHECK(coarse->clip == Clip::per_plane);

    const auto between = plan_resampling(kImage, {4, 5, 6}, {8, 5, 6}, {5, 1, 1}, kCube);
    CHECK(between->clip == Clip::none);
    CHECK(between->is_local());

    const auto logits = plan_resampling(kLogits, {4, 5, 6}, {8, 7, 8}, {1, 5, 1}, kCube);
    CHECK(logits->orders == std::array<int, 3>{1, 0, 1});
    CHECK(logits->clip == Clip::none);
    CHECK(logits->is_local());

    const ResampleSpec torch{Convention::torch, 1, 0, {}, 3};
    CHECK(!plan_resampling(torch, {4, 5, 6}, {8, 7, 8}, kCube, kCube)->keeps_type());
}

TEST_CASE("linear between samples, repeated at the border") {
    // two samples to four: positions -0.25, 0.25, 0.75, 1.25
    const auto plan = plan_resampling(kLogits, {1, 1, 2}, {1, 1, 4}, kCube, kCube);
    CHECK(resampled({0, 4}, {1, 1, 2}, *plan) == std::vector<float>{0, 1, 3, 4});
    const ResamplePlan impossible{Convention::scipy, {0, 0, 9}, {}, Clip::none, {1, 1, 4}};
    CHECK_THROWS_AS(resampled({0, 4, 8}, {1, 1, 3}, impossible), std::invalid_argument);
}

TEST_CASE("planes across any axis are resampled each by itself and clipped to their own range") {
    // A step from 0 to 1 in one plane and from 10 to 11 in the other: a cubic goes beyond both ends of each by up to a
    // tenth, and may do neither if clipped by plane.
    const std::vector<float> step{0, 0, 0, 1, 1, 1}, far{10, 10, 10, 11, 11, 11};
    for (int across = 0; across < 3; ++across) {
        const int along = across == 2 ? 1 : 2;
        Index shape{1, 1, 1}, shape_out{1, 1, 1};
        shape[across] = shape_out[across] = 2;
        shape[along] = 6;
        shape_out[along] = 9;
        Spacing spacing{1, 1, 1};
        spacing[across] = 5;
        const auto plan = plan_resampling(kImage, shape, shape_out, spacing, spacing);
        CHECK(plan->separate_axis == across);
        CHECK(plan->clip == Clip::per_plane);
        std::vector<float> values;
        for (std::size_t i = 0; i < 12; ++i) {
            // planes follow each other, or (across x) alternate
            const bool second = across == 2 ? i % 2 == 1 : i >= 6;
            const std::size_t at = across == 2 ? i / 2 : i % 6;
            values.push_back((second ? far : step)[at]);
        }
        const std::vector<float> out = resampled(values, shape, *plan);
        for (std::size_t i = 0; i < 9; ++i) {
            const float low = across == 2 ? out[2 * i] : out[i], high = across == 2 ? out[2 * i + 1] : out[9 + i];
            CHECK(low >= 0);
            CHECK(low <= 1);
            CHECK(high >= 10);
            CHECK(high <= 11);
            if (i == 4) CHECK((low > 0.499f && low < 0.501f));  // the middle of the step, by symmetry
            if (i == 0) CHECK((low < 0.01f && high < 10.01f));
            if (i == 8) CHECK((low > 0.99f && high > 10.99f));
        }
    }
}
