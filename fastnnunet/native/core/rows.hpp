// Arithmetic on rows of float32, vectorised for the processor at hand.
#pragma once

#include <cstdint>

#include "core/view.hpp"

namespace fastnnunet {

// float16 or float32 to float32
void read_row(const Half* in, float* out, std::int64_t count);
void read_row(const float* in, float* out, std::int64_t count);

// The smallest and largest value into low and high; they are starting values too. NaN makes both NaN.
void extend_limits(const float* in, std::int64_t count, float& low, float& high);
void extend_limits(const Half* in, std::int64_t count, float& low, float& high);

// A pair of rows and their weights: value = a[i] * weight_a + b[i] * weight_b, then rounded to float16's grid if asked
struct Blend {
    const float* a;
    const float* b;
    float weight_a;
    float weight_b;
    bool to_half;
};

void blend_row(const Blend& blend, float* out, std::int64_t count);

// best = max(best, value), label = head where the value is the larger
void argmax_row(const Blend& blend, std::uint32_t head, float* best, std::uint32_t* label, std::int64_t count);

// label = painted where sigmoid(value) in float32 is above 0.5
void paint_row(const Blend& blend, std::uint32_t painted, std::uint32_t* label, std::int64_t count);

// out[i] = in[low[i]] * weight_low[i] + in[low[i] + 1] * weight_high[i]; `in` has one value more than is meant
void interpolate_row(const float* in, const std::int32_t* low, const float* weight_low, const float* weight_high,
                     float* out, std::int64_t count);

}  // namespace fastnnunet
