// Weights of small tiles; the numbers are worked out by hand.
#include "core/gaussian.hpp"

#include <stdexcept>

#include "check.hpp"
#include "core/half.hpp"

using namespace fastnnunet;

TEST_CASE("limits of float16") {
    CHECK(fits_half(-65519.0f, 65519.0f));
    CHECK(!fits_half(0.0f, 65520.0f));
    CHECK(!fits_half(-65520.0f, 0.0f));
    const float not_a_number = float_of(0x7FC00000u);
    CHECK(!fits_half(not_a_number, not_a_number));
}

TEST_CASE("a peak of ten where nnU-Net's delta is") {
    CHECK(gaussian_weights({1}) == std::vector<float>{10.0f});
    CHECK_THROWS_AS(gaussian_weights({4, 0}), std::invalid_argument);
    // sigma 1/4: 10 exp(-8) = 0.00335463; float16 has steps of 2^-19 there, and 1759 of them are 0.00335503
    CHECK(gaussian_weights({2}) == std::vector<float>{1759.0f / (1 << 19), 10.0f});
    // sigma 1/2: distances 2, 1, 0, 1; 10 exp(-2) = 1.353353 is 1386 / 1024
    CHECK(gaussian_weights({4}) == std::vector<float>{1759.0f / (1 << 19), 1386.0f / 1024, 10.0f, 1386.0f / 1024});
}

TEST_CASE("weights that float16 rounds to zero become the smallest there is") {
    // the corner is 10 exp(-24) = 3.8e-10, below 2^-25; the smallest others are 10 exp(-16) = 1.125e-6, 19 * 2^-24
    const std::vector<float> weights = gaussian_weights({2, 2, 2});
    const float edge = 19.0f / (1 << 24);
    const float face = 1759.0f / (1 << 19);
    CHECK(weights == std::vector<float>{edge, edge, edge, face, edge, face, face, 10.0f});
}
