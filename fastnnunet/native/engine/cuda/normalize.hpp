// Where an image is not zero, and its intensities: nnU-Net's float32 operations with NumPy's pairwise sums.
//
// NumPy halves an array (at multiples of eight) until 128 values or fewer are left, adds these up in eight partial sums,
// and adds up the halves. That tree is followed here, so mean and standard deviation are core/normalize.cpp's to the bit:
// `pairwise_leaves` makes the sums of the leaves, at the places they would have if the tree were complete, and
// `pairwise_combine` takes up to ten levels at a time off it.
#pragma once

#include "body.hpp"
#include "window.hpp"

namespace fastnnunet::cuda {

// Part of a float32 volume (z, y, x), x contiguous; its values in this order are those NumPy adds up in memory order
struct Region {
    float* data;
    i64 shape[3];
    i64 stride_z, stride_y;
};

// Extends `box` (lowest z, y, x; then one more than the highest) by what is not zero in any channel; NaN is not zero.
// Starts as {~0, ~0, ~0, 0, 0, 0}.
struct BoxParams {
    const float* image;  // (channels, *shape), contiguous
    u32* box;
    i64 channels;
    i64 shape[3];
};

struct Extent {
    u32 low[3], high[3];
};

template <class At>
FNN_HD void nonzero_box(const At& at, const BoxParams& p) {
    Extent mine{{~0u, ~0u, ~0u}, {0, 0, 0}};
    const i64 height = p.shape[1], width = p.shape[2], rows = p.channels * p.shape[0] * height;
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const auto [channel, z, y] = row_of(row, p.shape[0], height);
        const u32 at_zyx[3] = {static_cast<u32>(z), static_cast<u32>(y), 0};
        for (i64 x = at.x(); x < width; x += at.x_step()) {
            if (p.image[row * width + x] == 0) continue;
            for (int axis = 0; axis < 3; ++axis) {
                const u32 index = axis == 2 ? static_cast<u32>(x) : at_zyx[axis];
                mine.low[axis] = index < mine.low[axis] ? index : mine.low[axis];
                mine.high[axis] = index + 1 > mine.high[axis] ? index + 1 : mine.high[axis];
            }
        }
    }
    const Extent* all = over_block(at, mine, [](Extent& into, const Extent& other) {
        for (int axis = 0; axis < 3; ++axis) {
            into.low[axis] = other.low[axis] < into.low[axis] ? other.low[axis] : into.low[axis];
            into.high[axis] = other.high[axis] > into.high[axis] ? other.high[axis] : into.high[axis];
        }
    });
    if (at.in_block() != 0 || all->high[0] == 0) return;
    for (int axis = 0; axis < 3; ++axis) {
        at.lower(&p.box[axis], all->low[axis]);
        at.raise(&p.box[3 + axis], all->high[axis]);
    }
}

// limits[z / planes] extended by the values of each plane z: planes is 1, or the depth of the volume for one pair
struct LimitsParams {
    const void* data;
    Limits* limits;
    i64 type;  // kFloat or kHalf
    i64 shape[3];
    i64 stride[3];
    i64 planes;
};

template <class At>
FNN_HD void find_limits(const At& at, const LimitsParams& p) {
    for (i64 z = at.group(); z < p.shape[0]; z += at.groups()) {
        Limits mine = no_limits();
        for (i64 y = at.row(); y < p.shape[1]; y += at.row_step()) {
            const i64 row = z * p.stride[0] + y * p.stride[1];
            for (i64 x = at.x(); x < p.shape[2]; x += at.x_step()) {
                extend(mine, load_float(p.data, p.type, row + x * p.stride[2]));
            }
        }
        store_limits(at, mine, &p.limits[quotient(z, p.planes)]);
    }
}

// `count` limits as they are before any value
struct FillParams {
    Limits* limits;
    i64 count;
};

template <class At>
FNN_HD void fill_limits(const At& at, const FillParams& p) {
    if (at.row() != 0) return;
    for (i64 i = at.x(); i < p.count; i += at.x_step()) p.limits[i] = no_limits();
}

constexpr i64 kLeaf = 128;     // values that NumPy adds up without halving
constexpr int kLeafLanes = 8;  // its partial sums
constexpr int kLeavesPerBlock = kBlockThreads / kLeafLanes;
constexpr int kMostLevels = 10;  // combined by one block

struct Node {
    i64 start, count;
    bool exists;  // false: a leaf further up covers it
};

// The node `number` at depth `depth` of the tree over `count` values. Of a leaf further up the leftmost below it exists.
FNN_HD Node node_at(i64 count, int depth, i64 number) {
    i64 start = 0;
    for (int level = depth - 1; level >= 0; --level) {
        const bool is_right = number >> level & 1;
        if (count <= kLeaf) {
            if (is_right) return {0, 0, false};
            continue;
        }
        i64 half = count / 2;
        half -= half % kLeafLanes;
        start += is_right ? half : 0;
        count = is_right ? count - half : half;
    }
    return {start, count, true};
}

// Whether the node has two below it
FNN_HD bool is_halved(i64 count, int depth, i64 number) {
    for (int level = depth - 1; level >= 0; --level) {
        if (count <= kLeaf) return false;
        i64 half = count / 2;
        half -= half % kLeafLanes;
        count = number >> level & 1 ? count - half : half;
    }
    return count > kLeaf;
}

// sums (2^depth): of each leaf, of the values or, with `mean`, of their squared distances from it
struct LeavesParams {
    Region region;
    const float* mean;  // one value; null: the values themselves are added
    float* sums;
    i64 depth;
};

// A place in a region that goes on value by value
struct Cursor {
    i64 z, y, x;

    FNN_HD void move(const Region& region, i64 by) {
        x += by;
        while (x >= region.shape[2]) {
            x -= region.shape[2];
            if (++y == region.shape[1]) y = 0, ++z;
        }
    }
    FNN_HD float value(const Region& region, const float* mean) const {
        const float value = region.data[z * region.stride_z + y * region.stride_y + x];
        if (!mean) return value;
        const float distance = value - *mean;
        return distance * distance;
    }
};

FNN_HD Cursor cursor_at(const Region& region, i64 number) {
    const auto [z, y, x] = row_of(number, region.shape[1], region.shape[2]);
    return {z, y, x};
}

template <class At>
FNN_HD void pairwise_leaves(const At& at, const LeavesParams& p) {
    float* partial = at.template shared<float>() + at.in_block() / kLeafLanes * kLeafLanes;
    const int lane = at.in_block() % kLeafLanes;
    const i64 count = p.region.shape[0] * p.region.shape[1] * p.region.shape[2], leaves = i64{1} << p.depth;
    for (i64 block = at.block(); block * kLeavesPerBlock < leaves; block += at.blocks()) {
        const i64 leaf = block * kLeavesPerBlock + at.in_block() / kLeafLanes;
        const Node node = leaf < leaves ? node_at(count, static_cast<int>(p.depth), leaf) : Node{0, 0, false};
        const i64 even = node.count - node.count % kLeafLanes;
        float sum = 0;
        if (node.exists && even > 0) {
            Cursor cursor = cursor_at(p.region, node.start + lane);
            sum = cursor.value(p.region, p.mean);
            for (i64 i = kLeafLanes; i < even; i += kLeafLanes) {
                cursor.move(p.region, kLeafLanes);
                sum += cursor.value(p.region, p.mean);
            }
        }
        partial[lane] = sum;
        at.sync();
        if (lane == 0 && node.exists) {
            sum = even == 0 ? 0.0f
                            : ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
                                  ((partial[4] + partial[5]) + (partial[6] + partial[7]));
            Cursor cursor = cursor_at(p.region, node.start + even);
            for (i64 i = even; i < node.count; ++i, cursor.move(p.region, 1)) sum += cursor.value(p.region, p.mean);
            p.sums[leaf] = sum;
        }
        at.sync();
    }
}

// out (2^(depth - levels)) of in (2^depth)
struct CombineSumsParams {
    const float* in;
    float* out;
    i64 count;  // of the values
    i64 depth, levels;
};

template <class At>
FNN_HD void pairwise_combine(const At& at, const CombineSumsParams& p) {
    float* sums = at.template shared<float>();
    const i64 width = i64{1} << p.levels, groups = i64{1} << (p.depth - p.levels);
    for (i64 group = at.block(); group < groups; group += at.blocks()) {
        for (i64 i = at.in_block(); i < width; i += kBlockThreads) sums[i] = p.in[group * width + i];
        at.sync();
        // a sum lies where its leftmost leaf was
        for (int level = 1; level <= p.levels; ++level) {
            const i64 nodes = width >> level, step = i64{1} << level;
            for (i64 i = at.in_block(); i < nodes; i += kBlockThreads) {
                if (!is_halved(p.count, static_cast<int>(p.depth) - level, group * nodes + i)) continue;
                sums[i * step] = sums[i * step] + sums[i * step + step / 2];
            }
            at.sync();
        }
        if (at.in_block() == 0) p.out[group] = sums[0];
        at.sync();
    }
}

// What `scale` takes, from sums and limits, by one thread
enum Finish : i64 { kMean = 0, kDeviation = 1, kRange = 2 };
struct FinishParams {
    const float* sum;  // kMean, kDeviation
    const Limits* limits;  // kRange
    float* out;  // [0]: mean or lowest; [1]: standard deviation, or highest - lowest
    i64 count;
    i64 what;
};

template <class At>
FNN_HD void finish_moments(const At& at, const FinishParams& p) {
    if (at.x() != 0 || at.row() != 0) return;
    if (p.what == kRange) {
        const float nan = float_of(0x7FC00000u);
        const float low = p.limits->has_nan ? nan : value_of_key(p.limits->low);
        const float high = p.limits->has_nan ? nan : value_of_key(p.limits->high);
        p.out[0] = low;
        p.out[1] = high - low;
        return;
    }
    const float by_count = static_cast<float>(static_cast<double>(*p.sum) / static_cast<double>(p.count));
    if (p.what == kMean) p.out[0] = by_count;
    if (p.what == kDeviation) p.out[1] = sqrtf(by_count);
}

// (clip(value, low, high) - shift) / max(divisor, 1e-8); shift and divisor from `moments` where it is given
struct ScaleParams {
    Region region;
    const float* moments;
    float low, high, shift, divisor;
};

template <class At>
FNN_HD void scale(const At& at, const ScaleParams& p) {
    const float shift = p.moments ? p.moments[0] : p.shift;
    const float wanted = p.moments ? p.moments[1] : p.divisor;
    const float divisor = wanted < 1e-8f ? 1e-8f : wanted;
    const i64 rows = p.region.shape[0] * p.region.shape[1];
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const auto [one, z, y] = row_of(row, p.region.shape[0], p.region.shape[1]);
        float* values = p.region.data + z * p.region.stride_z + y * p.region.stride_y;
        for (i64 x = at.x(); x < p.region.shape[2]; x += at.x_step()) {
            float value = values[x];
            value = value < p.low ? p.low : value;
            value = value > p.high ? p.high : value;
            values[x] = (value - shift) / divisor;
        }
    }
}

}  // namespace fastnnunet::cuda
