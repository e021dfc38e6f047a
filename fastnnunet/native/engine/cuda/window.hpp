// Tiles of the sliding window: cut out with their mirrored copies, averaged over mirrors, added up in float16.
//
// The arithmetic is core/accumulate.cpp's and that of the mean over mirrors in engines/mirrors.py: results are theirs to
// the bit.
#pragma once

#include "body.hpp"

namespace fastnnunet::cuda {

// out (count, channels, *tile), float32: for each tile what lies at its origin, zeros around the image, mirrored
struct GatherParams {
    const float* image;  // (channels, *shape), contiguous
    float* out;
    i64 channels;
    i64 shape[3];
    i64 tile[3];
    i64 count;  // tiles, of which each has `copies` mirrored copies: first the first copy of all tiles, then the second
    i64 copies;
    i64 origin[kMostTiles][3];  // of each tile, in voxels of the image; may lie before it
    i64 flips[kMostFlips];      // of each copy: bit 0 z, bit 1 y, bit 2 x
};

template <class At>
FNN_HD void gather(const At& at, const GatherParams& p) {
    const i64 depth = p.tile[0], height = p.tile[1], width = p.tile[2];
    const i64 rows = p.copies * p.count * p.channels * depth * height;
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const auto [volume, z_out, y_out] = row_of(row, depth, height);
        const i64 slot = quotient(volume, p.channels), channel = volume - slot * p.channels;
        const i64 copy = quotient(slot, p.count), flips = p.flips[copy];
        const i64* origin = p.origin[slot - copy * p.count];
        const i64 z = origin[0] + (flips & 1 ? depth - 1 - z_out : z_out);
        const i64 y = origin[1] + (flips & 2 ? height - 1 - y_out : y_out);
        const bool is_inside = z >= 0 && z < p.shape[0] && y >= 0 && y < p.shape[1];
        const i64 from = ((channel * p.shape[0] + z) * p.shape[1] + y) * p.shape[2];
        for (i64 x_out = at.x(); x_out < width; x_out += at.x_step()) {
            const i64 x = origin[2] + (flips & 4 ? width - 1 - x_out : x_out);
            p.out[row * width + x_out] = is_inside && x >= 0 && x < p.shape[2] ? p.image[from + x] : 0.0f;
        }
    }
}

// total = the sum over `copies` of parts mirrored back, in their order, begun with total itself unless is_first
struct MirrorParams {
    const float* parts;  // (copies, heads, *tile)
    float* total;        // (heads, *tile)
    i64 heads;           // of all tiles of the batch
    i64 tile[3];
    i64 copies;
    i64 flips[kMostFlips];
    i64 is_first;
    float divisor;  // of the sum; 0: none
    float unused;
};

template <class At>
FNN_HD void add_mirrored(const At& at, const MirrorParams& p) {
    const i64 depth = p.tile[0], height = p.tile[1], width = p.tile[2], rows = p.heads * depth * height;
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const auto [head, z, y] = row_of(row, depth, height);
        for (i64 x = at.x(); x < width; x += at.x_step()) {
            float value = p.is_first ? 0.0f : p.total[row * width + x];
            for (i64 copy = 0; copy < p.copies; ++copy) {
                const i64 flips = p.flips[copy];
                const i64 z_in = flips & 1 ? depth - 1 - z : z, y_in = flips & 2 ? height - 1 - y : y;
                const i64 x_in = flips & 4 ? width - 1 - x : x;
                const float part = p.parts[(((copy * p.heads + head) * depth + z_in) * height + y_in) * width + x_in];
                value = copy == 0 && p.is_first ? part : value + part;
            }
            p.total[row * width + x] = p.divisor != 0 ? value / p.divisor : value;
        }
    }
}

// A box of volumes, x contiguous; strides in elements, of heads, z and y
struct Strides {
    i64 head, z, y;
};
FNN_HD i64 row_at(const Strides& strides, i64 head, i64 z, i64 y) {
    return head * strides.head + z * strides.z + y * strides.y;
}

// sums = half(sums + logits * weights); is_first: half(logits * weights), whatever sums held
struct AddParams {
    const float* logits;
    const float* weights;  // its strides have no head; null: one everywhere
    Half* sums;
    i64 heads;
    i64 shape[3];
    Strides logits_stride, weights_stride, sums_stride;
    i64 is_first;
};

template <class At>
FNN_HD void add_weighted(const At& at, const AddParams& p) {
    const i64 rows = p.heads * p.shape[0] * p.shape[1];
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const auto [head, z, y] = row_of(row, p.shape[0], p.shape[1]);
        const float* logits = p.logits + row_at(p.logits_stride, head, z, y);
        const float* weights = p.weights ? p.weights + row_at(p.weights_stride, 0, z, y) : nullptr;
        Half* sums = p.sums + row_at(p.sums_stride, head, z, y);
        for (i64 x = at.x(); x < p.shape[2]; x += at.x_step()) {
            const float product = logits[x] * (weights ? weights[x] : 1.0f);
            sums[x] = to_half(p.is_first ? product : to_float(sums[x]) + product);
        }
    }
}

// sums = half(sums + values), as of the folds of an ensemble
struct AddHalvesParams {
    const Half* values;
    Half* sums;
    i64 heads;
    i64 shape[3];
    Strides values_stride, sums_stride;
};

template <class At>
FNN_HD void add_halves(const At& at, const AddHalvesParams& p) {
    const i64 rows = p.heads * p.shape[0] * p.shape[1];
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const auto [head, z, y] = row_of(row, p.shape[0], p.shape[1]);
        const Half* values = p.values + row_at(p.values_stride, head, z, y);
        Half* sums = p.sums + row_at(p.sums_stride, head, z, y);
        for (i64 x = at.x(); x < p.shape[2]; x += at.x_step()) {
            sums[x] = to_half(to_float(sums[x]) + to_float(values[x]));
        }
    }
}

FNN_HD void merge_limits(Limits& into, const Limits& other) {
    into.low = other.low < into.low ? other.low : into.low;
    into.high = other.high > into.high ? other.high : into.high;
    into.has_nan |= other.has_nan;
}

// Every thread of the block calls it.
template <class At>
FNN_HD void store_limits(const At& at, const Limits& mine, Limits* to) {
    const Limits* all = over_block(at, mine, [](Limits& into, const Limits& other) { merge_limits(into, other); });
    if (at.in_block() == 0) {
        at.lower(&to->low, all->low);
        at.raise(&to->high, all->high);
        at.raise(&to->has_nan, all->has_nan);
    }
    at.sync();  // before the memory is used again
}

// sums = half(sums / total). Extends limits[0] by the sums before, limits[1] by the quotients.
struct DivideParams {
    Half* sums;
    const Half* total;  // its strides have no head; null: `count` everywhere
    Limits* limits;
    i64 heads;
    i64 shape[3];
    Strides sums_stride, total_stride;
    float count;
    float unused;
};

template <class At>
FNN_HD void divide(const At& at, const DivideParams& p) {
    const i64 rows = p.heads * p.shape[0] * p.shape[1];
    Limits before = no_limits(), after = no_limits();
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const auto [head, z, y] = row_of(row, p.shape[0], p.shape[1]);
        Half* sums = p.sums + row_at(p.sums_stride, head, z, y);
        const Half* total = p.total ? p.total + row_at(p.total_stride, 0, z, y) : nullptr;
        for (i64 x = at.x(); x < p.shape[2]; x += at.x_step()) {
            const float sum = to_float(sums[x]);
            extend(before, sum);
            sums[x] = to_half(sum / (total ? to_float(total[x]) : p.count));
            extend(after, to_float(sums[x]));
        }
    }
    store_limits(at, before, &p.limits[0]);
    store_limits(at, after, &p.limits[1]);
}

// out = in, of float16 volumes: planes and rows that a chunk needs of the chunks before it
struct CopyParams {
    const Half* in;
    Half* out;
    i64 heads;
    i64 shape[3];
    Strides in_stride, out_stride;
};

template <class At>
FNN_HD void copy_halves(const At& at, const CopyParams& p) {
    const i64 rows = p.heads * p.shape[0] * p.shape[1];
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const auto [head, z, y] = row_of(row, p.shape[0], p.shape[1]);
        const Half* in = p.in + row_at(p.in_stride, head, z, y);
        Half* out = p.out + row_at(p.out_stride, head, z, y);
        for (i64 x = at.x(); x < p.shape[2]; x += at.x_step()) out[x] = in[x];
    }
}

}  // namespace fastnnunet::cuda
