#include "core/kl.hpp"

#include <vector>

#include "core/half.hpp"
#include "core/simd.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

constexpr std::int64_t BLOCK = 256;  // voxels at a time: all their classes stay in the cache
constexpr float LOWEST = -87.0f;  // exp of it is still a normal number
constexpr float SMALLEST = 1e-12f;  // clamps log(0); p * log p is 0 at p = 0

// exp(x) for -87 <= x <= 0, relative error below 3e-7; NaN of NaN. x = n ln 2 + r, |r| <= ln 2 / 2, and Taylor's series
// of exp(r). A loop over it becomes vector instructions, which one over std::exp does not.
FASTNNUNET_INLINE float exp_of(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds and leaves n in the last bits
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return y * float_of((bits_of(shifted) << 23) + (127u << 23));
}

// log(x) for normal x > 0, error below 2e-7 of max(1, |log x|). x = 2^e m with m in [sqrt(1/2), sqrt(2)), and
// log m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172.
FASTNNUNET_INLINE float log_of(float x) {
    const std::uint32_t bits = bits_of(x), half_power = 0x3f3504f3;  // sqrt(1/2)
    const std::int32_t e = static_cast<std::int32_t>(bits - half_power) >> 23;
    const float m = float_of(bits - (static_cast<std::uint32_t>(e) << 23));
    const float s = (m - 1.0f) / (m + 1.0f);
    const float s2 = s * s;
    float series = 1.0f / 9;
    series = series * s2 + 1.0f / 7;
    series = series * s2 + 1.0f / 5;
    series = series * s2 + 1.0f / 3;
    series = series * s2 + 1.0f;
    const float exponent = static_cast<float>(e);
    return exponent * 0.693359375f + (2.0f * s * series - exponent * 2.12194440e-4f);
}

struct Scratch {
    std::vector<float> scaled, powers;  // (channels, BLOCK)
};

FASTNNUNET_CLONES
double block(const Samples<const float>& logits, const Samples<const float>& soft, const std::uint8_t* mask,
             float inverse_temperature, const Samples<float>& difference, std::int64_t sample, std::int64_t first,
             std::int64_t count, float* scaled, float* powers) {
    float largest[BLOCK], total[BLOCK], log_total[BLOCK], background[BLOCK], positive[BLOCK], counts[BLOCK], kl[BLOCK];
    for (std::int64_t i = 0; i < count; ++i) {
        largest[i] = -3.4e38f;
        total[i] = 0.0f;
        background[i] = 1.0f;
        kl[i] = 0.0f;
        counts[i] = mask == nullptr || mask[i] != 0 ? 1.0f : 0.0f;
    }
    for (std::int64_t c = 0; c < logits.channels; ++c) {
        const std::int64_t stride = logits.stride_voxel;
        const float* from = logits.data + sample * logits.stride_sample + c * logits.stride_channel + first * stride;
        float* z = scaled + c * BLOCK;
        if (stride == 1) {
            for (std::int64_t i = 0; i < count; ++i) z[i] = from[i] * inverse_temperature;
        } else {
            for (std::int64_t i = 0; i < count; ++i) z[i] = from[i * stride] * inverse_temperature;
        }
        for (std::int64_t i = 0; i < count; ++i) largest[i] = z[i] > largest[i] ? z[i] : largest[i];
    }
    for (std::int64_t c = 0; c < logits.channels; ++c) {
        float *z = scaled + c * BLOCK, *power = powers + c * BLOCK;
        // limits in loops of their own: a compiler that knows the result at the limit makes a branch of it
        for (std::int64_t i = 0; i < count; ++i) {
            z[i] -= largest[i];
            power[i] = z[i] < LOWEST ? LOWEST : z[i];
        }
        for (std::int64_t i = 0; i < count; ++i) {
            power[i] = exp_of(power[i]);
            total[i] += power[i];
        }
    }
    for (std::int64_t i = 0; i < count; ++i) {
        log_total[i] = log_of(total[i]);
        total[i] = 1.0f / total[i];
    }
    const float* targets = soft.data + sample * soft.stride_sample + first;
    for (std::int64_t c = 0; c < soft.channels; ++c) {
        const float* target = targets + c * soft.stride_channel;
        for (std::int64_t i = 0; i < count; ++i) background[i] -= target[i];
    }
    for (std::int64_t i = 0; i < count; ++i) background[i] = background[i] < 0.0f ? 0.0f : background[i];
    for (std::int64_t c = 0; c < logits.channels; ++c) {
        const float *z = scaled + c * BLOCK, *target = c == 0 ? background : targets + (c - 1) * soft.stride_channel;
        float* power = powers + c * BLOCK;
        for (std::int64_t i = 0; i < count; ++i) positive[i] = target[i] < SMALLEST ? SMALLEST : target[i];
        for (std::int64_t i = 0; i < count; ++i) {
            kl[i] += target[i] * (log_of(positive[i]) - (z[i] - log_total[i]));
            power[i] = (power[i] * total[i] - target[i]) * counts[i];
        }
        const std::int64_t stride = difference.stride_voxel;
        float* to = difference.data + sample * difference.stride_sample + c * difference.stride_channel + first * stride;
        if (stride == 1) {
            for (std::int64_t i = 0; i < count; ++i) to[i] = power[i];
        } else {
            for (std::int64_t i = 0; i < count; ++i) to[i * stride] = power[i];
        }
    }
    double sums[8] = {};
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        for (std::int64_t j = 0; j < 8; ++j) sums[j] += static_cast<double>(kl[i + j] * counts[i + j]);
    }
    for (; i < count; ++i) sums[0] += static_cast<double>(kl[i] * counts[i]);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

KLSum kl_classes(const Samples<const float>& logits, const Samples<const float>& soft, const std::uint8_t* mask,
                 float temperature, const Samples<float>& difference, int threads) {
    const std::int64_t blocks = (logits.voxels + BLOCK - 1) / BLOCK;
    const std::int64_t pieces = logits.samples * blocks;
    std::vector<double> sums(static_cast<std::size_t>(pieces));
    const auto size = static_cast<std::size_t>(logits.channels * BLOCK);
    const std::int64_t together = 64;  // blocks a thread takes at a time
    parallel_for<Scratch>((pieces + together - 1) / together, threads, [&](std::int64_t part, Scratch& scratch) {
        scratch.scaled.resize(size);
        scratch.powers.resize(size);
        for (std::int64_t piece = part * together; piece < pieces && piece < (part + 1) * together; ++piece) {
            const std::int64_t sample = piece / blocks, first = piece % blocks * BLOCK;
            const std::int64_t count = logits.voxels - first < BLOCK ? logits.voxels - first : BLOCK;
            const std::uint8_t* where = mask == nullptr ? nullptr : mask + sample * logits.voxels + first;
            sums[static_cast<std::size_t>(piece)] =
                block(logits, soft, where, 1.0f / temperature, difference, sample, first, count, scratch.scaled.data(),
                      scratch.powers.data());
        }
    });
    KLSum result{0.0, logits.samples * logits.voxels};
    for (const double sum : sums) result.sum += sum;
    if (mask != nullptr) {
        result.voxels = 0;
        for (std::int64_t i = 0; i < logits.samples * logits.voxels; ++i) result.voxels += mask[i] != 0;
    }
    return result;
}

}  // namespace fastnnunet
