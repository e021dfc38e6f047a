// float16 by integer arithmetic that compilers turn into vector instructions on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.hpp"
#include "core/view.hpp"

namespace fastnnunet {

FASTNNUNET_INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

FASTNNUNET_INLINE float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

constexpr float kHalfOverflow = 65520;  // the smallest magnitude that rounds to infinity in float16

// Whether float16 holds all of the values of which these are the limits; NaN is none.
inline bool fits_half(float lowest, float highest) { return lowest > -kHalfOverflow && highest < kHalfOverflow; }

// The float nearest to `value` that float16 can hold, ties to even, subnormals included. Magnitudes of 65520 and above,
// where float16 has only infinity, stay finite.
FASTNNUNET_INLINE float round_to_half(float value) {
    // 1.5 * 2^(e + 13) for a value of exponent e: adding it leaves a float exactly the 10 mantissa bits of float16.
    std::uint32_t magic = (bits_of(value) & 0x7F800000u) + ((13u << 23) | 0x00400000u);
    // Below 2^-14 float16 is subnormal with the fixed quantum 2^-24, which is the spacing of floats around 0.75.
    magic = magic < 0x3F400000u ? 0x3F400000u : magic;
    const float shift = float_of(magic);
    return (value + shift) - shift;
}

FASTNNUNET_INLINE float to_float(Half half) {
    const std::uint32_t magnitude = (half.bits & 0x7FFFu) << 13;
    const std::uint32_t sign = static_cast<std::uint32_t>(half.bits & 0x8000u) << 16;
    const std::uint32_t normal = magnitude + (112u << 23);
    // exponent 31: infinity or NaN
    const std::uint32_t special = magnitude | 0x7F800000u;
    // subnormal: the mantissa in the last bits of a float of exponent -14, less that float
    const std::uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    std::uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
    bits = magnitude >= (31u << 23) ? special : bits;
    return float_of(bits | sign);
}

FASTNNUNET_INLINE float to_float(float value) { return value; }

// Rounds to nearest, ties to even; 65520 and above become infinity, NaN stays NaN.
FASTNNUNET_INLINE Half to_half(float value) {
    const std::uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
    const std::uint32_t rounded = bits_of(round_to_half(float_of(magnitude)));
    // subnormal: float16 counts in units of 2^-24, and so does a float near 0.5 count in units of 2^-24
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    std::uint32_t bits = (rounded - (112u << 23)) >> 13;
    bits = magnitude < (113u << 23) ? subnormal : bits;
    bits = magnitude >= 0x477FF000u ? 0x7C00u : bits;
    bits = magnitude > 0x7F800000u ? 0x7E00u : bits;
    return Half{static_cast<std::uint16_t>(bits | sign)};
}

}  // namespace fastnnunet
