#include "core/rows.hpp"

#include <algorithm>
#include <limits>

#include "core/half.hpp"
#include "core/simd.hpp"

namespace fastnnunet {
namespace {

// 1 / (1 + exp(-x)) in float32 is above 0.5 from x = 2^-23 on, and not at 2^-24: there 1 + exp(-x) rounds to 2.
constexpr float kHalfProbability = 1.5f / (1 << 24);

template <bool ToHalf>
FASTNNUNET_INLINE float value_of(const Blend& blend, std::int64_t i) {
    const float value = blend.a[i] * blend.weight_a + blend.b[i] * blend.weight_b;
    return ToHalf ? round_to_half(value) : value;
}

template <bool ToHalf>
FASTNNUNET_INLINE void blend_values(const Blend blend, float* __restrict out, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = value_of<ToHalf>(blend, i);
}

template <bool ToHalf>
FASTNNUNET_INLINE void argmax_values(const Blend blend, std::uint32_t head, float* __restrict best,
                                     std::uint32_t* __restrict label, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float value = value_of<ToHalf>(blend, i);
        const bool wins = value > best[i];
        label[i] = wins ? head : label[i];
        best[i] = wins ? value : best[i];
    }
}

template <bool ToHalf>
FASTNNUNET_INLINE void paint_values(const Blend blend, std::uint32_t painted, std::uint32_t* __restrict label,
                                    std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        label[i] = value_of<ToHalf>(blend, i) > kHalfProbability ? painted : label[i];
    }
}

template <class T>
FASTNNUNET_INLINE void limits_of(const T* in, std::int64_t count, float& low, float& high) {
    constexpr int kLanes = 16;
    float lows[kLanes], highs[kLanes];
    std::uint32_t not_a_number[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) lows[lane] = low, highs[lane] = high;
    const std::int64_t even = count - count % kLanes;
    for (std::int64_t i = 0; i < even; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float value = to_float(in[i + lane]);
            lows[lane] = value < lows[lane] ? value : lows[lane];
            highs[lane] = value > highs[lane] ? value : highs[lane];
            not_a_number[lane] |= value != value ? 1u : 0u;
        }
    }
    for (std::int64_t i = even; i < count; ++i) {
        const float value = to_float(in[i]);
        lows[0] = std::min(lows[0], value);
        highs[0] = std::max(highs[0], value);
        not_a_number[0] |= value != value ? 1u : 0u;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        low = std::min(low, lows[lane]);
        high = std::max(high, highs[lane]);
        if (not_a_number[lane]) {
            low = high = std::numeric_limits<float>::quiet_NaN();
            return;
        }
    }
}

}  // namespace

FASTNNUNET_CLONES
void read_row(const Half* in, float* out, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

void read_row(const float* in, float* out, std::int64_t count) { std::copy(in, in + count, out); }

FASTNNUNET_CLONES
void extend_limits(const float* in, std::int64_t count, float& low, float& high) { limits_of(in, count, low, high); }

FASTNNUNET_CLONES
void extend_limits(const Half* in, std::int64_t count, float& low, float& high) { limits_of(in, count, low, high); }

FASTNNUNET_CLONES
void blend_row(const Blend& blend, float* out, std::int64_t count) {
    blend.to_half ? blend_values<true>(blend, out, count) : blend_values<false>(blend, out, count);
}

FASTNNUNET_CLONES
void argmax_row(const Blend& blend, std::uint32_t head, float* best, std::uint32_t* label, std::int64_t count) {
    blend.to_half ? argmax_values<true>(blend, head, best, label, count)
                  : argmax_values<false>(blend, head, best, label, count);
}

FASTNNUNET_CLONES
void paint_row(const Blend& blend, std::uint32_t painted, std::uint32_t* label, std::int64_t count) {
    blend.to_half ? paint_values<true>(blend, painted, label, count) : paint_values<false>(blend, painted, label, count);
}

FASTNNUNET_CLONES
void interpolate_row(const float* in, const std::int32_t* low, const float* weight_low, const float* weight_high,
                     float* out, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        out[i] = in[low[i]] * weight_low[i] + in[low[i] + 1] * weight_high[i];
    }
}

}  // namespace fastnnunet
