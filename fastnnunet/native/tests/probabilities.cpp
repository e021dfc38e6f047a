// Probabilities of a few logits, against values with more digits than float32 holds.
#include "core/probabilities.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "check.hpp"

using namespace fastnnunet;

namespace {

bool is_close(float got, double expected) { return std::abs(got - expected) <= 1.2e-7 * std::abs(expected); }

Volumes<float> heads(std::vector<float>& values, std::int64_t count) {
    const std::int64_t width = static_cast<std::int64_t>(values.size()) / count;
    return {values.data(), count, width, {1, 1, width}, {width, width}};
}

}  // namespace

TEST_CASE("softmax over heads") {
    std::vector<float> values{0, 1, 100, 0, 2, -100, 0, 3, -65504};  // three voxels
    softmax_heads(heads(values, 3), 1);
    CHECK(is_close(values[0], 1.0 / 3));
    CHECK(is_close(values[3], 1.0 / 3));
    CHECK(is_close(values[1], 0.09003057317038046));
    CHECK(is_close(values[4], 0.24472847105479764));
    CHECK(is_close(values[7], 0.6652409557748218));
    CHECK(values[2] == 1);
    CHECK(values[5] == 0);
    CHECK(values[8] == 0);
}

TEST_CASE("sigmoid at the ends of float16") {
    std::vector<float> values{0, 1, -1, -20, 65504, -65504, -80};
    sigmoid_heads(heads(values, 1), 1);
    CHECK(values[0] == 0.5f);
    CHECK(is_close(values[1], 0.7310585786300049));
    CHECK(is_close(values[2], 0.2689414213699951));
    CHECK(is_close(values[3], 2.0611536181902037e-09));
    CHECK(values[4] == 1);
    CHECK(values[5] == 0);
    CHECK(is_close(values[6], 1.8048513878454153e-35));
}

TEST_CASE("what is no number stays none") {
    std::vector<float> values{std::numeric_limits<float>::quiet_NaN()};
    sigmoid_heads(heads(values, 1), 1);
    CHECK(std::isnan(values[0]));
}
