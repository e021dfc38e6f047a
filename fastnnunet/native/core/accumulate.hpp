// Gaussian-weighted sums of overlapping tiles in float16, rounded where nnU-Net's are.
//
// nnU-Net adds logits * weights (float32) to a float16 array and divides that by the float16 sum of the weights. The
// arithmetic is float32 with a rounding after each step, so it does not depend on how the processor treats subnormals;
// 17 % of the weights of a 128^3 tile are subnormal in float16.
#pragma once

#include "core/view.hpp"

namespace fastnnunet {

// sums = half(sums + logits * weights); is_first: half(logits * weights), whatever sums held
void add_weighted(const Volumes<const float>& logits, const Volume<const float>& weights, const Volumes<Half>& sums,
                  bool is_first, int threads);

// sums = half(sums + values)
void add_halves(const Volumes<const Half>& values, const Volumes<Half>& sums, int threads);

struct QuotientLimits {
    float sum_low, sum_high;            // of the sums before
    float quotient_low, quotient_high;  // of the float16 quotients; infinite or NaN where float16 could not hold them
};

// sums = half(sums / total), for every head
QuotientLimits divide(const Volumes<Half>& sums, const Volume<const Half>& total, int threads);

// out = the float32 values nearest to `values` that float16 can hold; see round_to_half of one value
void round_to_half(const Volume<const float>& values, const Volume<float>& out, int threads);

}  // namespace fastnnunet
