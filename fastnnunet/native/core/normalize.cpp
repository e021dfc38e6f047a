#include "core/normalize.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "core/rows.hpp"
#include "core/simd.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

constexpr float kEpsilon = 1e-8f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kPairwiseBlock = 128;  // NumPy's: below it eight partial sums, above it halves
constexpr std::int64_t kPiece = 1 << 15;      // added up by one thread

// NumPy's pairwise sum of values that need no look-up
FASTNNUNET_CLONES
float sum_of_block(const float* values, std::int64_t count) {
    if (count < 8) {
        float sum = 0;
        for (std::int64_t i = 0; i < count; ++i) sum += values[i];
        return sum;
    }
    float partial[8];
    for (int lane = 0; lane < 8; ++lane) partial[lane] = values[lane];
    const std::int64_t even = count - count % 8;
    for (std::int64_t i = 8; i < even; i += 8) {
        for (int lane = 0; lane < 8; ++lane) partial[lane] += values[i + lane];
    }
    float sum = ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
                ((partial[4] + partial[5]) + (partial[6] + partial[7]));
    for (std::int64_t i = even; i < count; ++i) sum += values[i];
    return sum;
}

// The same recursion down to pieces of at most `stop`, whose sums `leaf(start, count)` gives in order
template <class Leaf>
float pairwise(std::int64_t start, std::int64_t count, std::int64_t stop, Leaf& leaf) {
    if (count <= stop) return leaf(start, count);
    std::int64_t half = count / 2;
    half -= half % 8;
    const float low = pairwise(start, half, stop, leaf);
    return low + pairwise(start + half, count - half, stop, leaf);
}

// Sum over [0, count) of what fetch(start, count, buffer) returns a pointer to (the buffer, or values where they lie)
template <class Fetch>
float parallel_sum(std::int64_t count, const Fetch& fetch, int threads) {
    std::vector<std::pair<std::int64_t, std::int64_t>> pieces;
    auto collect = [&](std::int64_t start, std::int64_t size) {
        pieces.emplace_back(start, size);
        return 0.0f;
    };
    pairwise(0, count, kPiece, collect);
    std::vector<float> sums(pieces.size());
    parallel_for(pieces.size(), threads, [&](std::int64_t number) {
        auto block = [&](std::int64_t start, std::int64_t size) {
            float buffer[kPairwiseBlock];
            return sum_of_block(fetch(start, size, buffer), size);
        };
        sums[number] = pairwise(pieces[number].first, pieces[number].second, kPairwiseBlock, block);
    });
    std::size_t next = 0;
    auto known = [&](std::int64_t, std::int64_t) { return sums[next++]; };
    return pairwise(0, count, kPiece, known);
}

FASTNNUNET_CLONES
void squared_distances(const float* values, std::int64_t count, float mean, float* out) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float distance = values[i] - mean;
        out[i] = distance * distance;
    }
}

// `values(start, count, buffer)`: as for parallel_sum
template <class Values>
Moments moments_of(std::int64_t count, const Values& values, int threads) {
    const auto by_count = [count](float sum) { return static_cast<float>(static_cast<double>(sum) / count); };
    const float mean = by_count(parallel_sum(count, values, threads));
    const auto squares = [&](std::int64_t start, std::int64_t size, float* buffer) -> const float* {
        squared_distances(values(start, size, buffer), size, mean, buffer);
        return buffer;
    };
    return {mean, std::sqrt(by_count(parallel_sum(count, squares, threads)))};
}

// Values of a volume by their number in memory order
const float* fetch(const Channel& channel, std::int64_t start, std::int64_t count, float* buffer) {
    const std::int64_t width = channel.shape[2];
    std::int64_t row = start / width, x = start % width;
    if (x + count <= width) return channel.row(row) + x;
    for (std::int64_t done = 0; done < count; ++row, x = 0) {
        const std::int64_t now = std::min(count - done, width - x);
        std::copy(channel.row(row) + x, channel.row(row) + x + now, buffer + done);
        done += now;
    }
    return buffer;
}

std::vector<float> values_inside(const Channel& channel, const Mask& mask, int threads) {
    std::vector<std::int64_t> offsets(channel.rows() + 1, 0);
    parallel_for(channel.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < channel.shape[1]; ++y) {
            const std::uint8_t* inside = mask.row(z, y);
            std::int64_t count = 0;
            for (std::int64_t x = 0; x < channel.shape[2]; ++x) count += inside[x] != 0;
            offsets[z * channel.shape[1] + y + 1] = count;
        }
    });
    for (std::size_t i = 1; i < offsets.size(); ++i) offsets[i] += offsets[i - 1];
    std::vector<float> values(offsets.back());
    parallel_for(channel.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < channel.shape[1]; ++y) {
            const std::uint8_t* inside = mask.row(z, y);
            const float* from = channel.row(z, y);
            float* to = values.data() + offsets[z * channel.shape[1] + y];
            for (std::int64_t x = 0; x < channel.shape[2]; ++x) {
                if (inside[x]) *to++ = from[x];
            }
        }
    });
    return values;
}

FASTNNUNET_CLONES
void scale_row(float* values, std::int64_t count, float low, float high, float shift, float divisor) {
    for (std::int64_t i = 0; i < count; ++i) {
        float value = values[i];
        value = value < low ? low : value;
        value = value > high ? high : value;
        values[i] = (value - shift) / divisor;
    }
}

FASTNNUNET_CLONES
void scale_row_inside(float* values, const std::uint8_t* inside, std::int64_t count, float shift, float divisor) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = inside[i] ? (values[i] - shift) / divisor : values[i];
}

void scale(const Channel& channel, float low, float high, float shift, float divisor, int threads) {
    parallel_for(channel.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < channel.shape[1]; ++y) {
            scale_row(channel.row(z, y), channel.shape[2], low, high, shift, divisor);
        }
    });
}

Volume<const float> read_only(const Channel& channel) { return {channel.data, channel.shape, channel.stride}; }

}  // namespace

Moments moments(const Channel& channel, const std::optional<Mask>& mask, int threads) {
    if (mask) {
        if (mask->shape != channel.shape) throw std::invalid_argument("normalisation: mask of another shape");
        const std::vector<float> inside = values_inside(channel, *mask, threads);
        const auto values = [&](std::int64_t start, std::int64_t, float*) { return inside.data() + start; };
        return moments_of(static_cast<std::int64_t>(inside.size()), values, threads);
    }
    if (channel.size() == 0) return {std::nanf(""), std::nanf("")};
    const auto values = [&](std::int64_t start, std::int64_t count, float* buffer) -> const float* {
        return channel.is_contiguous() ? channel.data + start : fetch(channel, start, count, buffer);
    };
    return moments_of(channel.size(), values, threads);
}

void z_score(const Channel& channel, const std::optional<Mask>& mask, int threads) {
    const Moments found = moments(channel, mask, threads);
    const float divisor = std::max(found.std, kEpsilon);
    if (!mask) return scale(channel, -kInfinity, kInfinity, found.mean, divisor, threads);
    parallel_for(channel.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < channel.shape[1]; ++y) {
            scale_row_inside(channel.row(z, y), mask->row(z, y), channel.shape[2], found.mean, divisor);
        }
    });
}

void clip_and_scale(const Channel& channel, float low, float high, float mean, float std, int threads) {
    scale(channel, low, high, mean, std::max(std, kEpsilon), threads);
}

void rescale_to_01(const Channel& channel, int threads) {
    const Range range = range_of(read_only(channel), threads);
    scale(channel, -kInfinity, kInfinity, range.low, std::max(range.high - range.low, kEpsilon), threads);
}

Range range_of(const Volume<const float>& channel, int threads) {
    std::vector<Range> planes(channel.shape[0], Range{kInfinity, -kInfinity});
    parallel_for(channel.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < channel.shape[1]; ++y) {
            extend_limits(channel.row(z, y), channel.shape[2], planes[z].low, planes[z].high);
        }
    });
    Range all{kInfinity, -kInfinity};
    for (const Range& plane : planes) {
        const float values[] = {plane.low, plane.high};
        extend_limits(values, 2, all.low, all.high);
    }
    return all;
}

Range rgb_to_01(const Channel& channel, int threads) {
    const Range range = range_of(read_only(channel), threads);
    if (range.low >= 0 && range.high <= 255) scale(channel, -kInfinity, kInfinity, 0, 255, threads);
    return range;
}

}  // namespace fastnnunet
