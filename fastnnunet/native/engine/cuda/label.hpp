// Labels of logits: linear resampling, argmax or painting of regions and uncropping at once, a voxel by one thread.
//
// The float32 arithmetic of core/label.cpp, so labels are its own. Nothing is kept per head. Where labels go is told by
// strides, so they land in the image before it was cropped and in its own axes.
#pragma once

#include "body.hpp"
#include "window.hpp"

namespace fastnnunet::cuda {

// Two neighbours and their weights for every output of an axis
struct Taps {
    const i32* low;
    const float* weight_low;
    const float* weight_high;
    i64 step;  // from the low neighbour to the high: 1, or 0 where every output is one input
};

// Where labels lie: strides in labels along z, y, x, each of `bytes` (1 or 2)
struct LabelMap {
    void* data;
    i64 stride[3];
    i64 bytes;
};

FNN_HD void store_label(const LabelMap& map, i64 z, i64 y, i64 x, u32 label) {
    const i64 at = z * map.stride[0] + y * map.stride[1] + x * map.stride[2];
    if (map.bytes == 1) {
        static_cast<u8*>(map.data)[at] = static_cast<u8>(label);
    } else {
        static_cast<u16*>(map.data)[at] = static_cast<u16>(label);
    }
}
FNN_HD u32 load_label(const LabelMap& map, i64 z, i64 y, i64 x) {
    const i64 at = z * map.stride[0] + y * map.stride[1] + x * map.stride[2];
    return map.bytes == 1 ? static_cast<const u8*>(map.data)[at] : static_cast<const u16*>(map.data)[at];
}

// 1 / (1 + exp(-x)) in float32 is above 0.5 from x = 2^-23 on, and not at 2^-24
constexpr float kHalfProbability = 1.5f / (1 << 24);

struct LabelParams {
    const void* logits;  // the part's first voxel of the first head
    i64 type;            // kFloat or kHalf
    Strides stride;
    i64 heads;
    Taps taps[3];            // of the whole
    i64 first_in[2];         // where the part begins in the whole: z and y of the logits,
    i64 first_out[2];        // and of the labels
    i64 shape_out[3];        // of the part
    i64 is_width_kept;       // along x nothing is resampled
    i64 rounds_to_half;
    const i32* regions;      // a label per head, painted in turn; null: the largest logit wins
    LabelMap labels;
};

struct Row {  // a row of logits, interpolated along x
    const void* logits;
    i64 type, at;

    FNN_HD float value(const LabelParams& p, i64 low, i64 high, float weight_low, float weight_high) const {
        const float first = load_float(logits, type, at + low);
        if (p.is_width_kept) return first;
        return first * weight_low + load_float(logits, type, at + high) * weight_high;
    }
};

template <class At>
FNN_HD void label_logits(const At& at, const LabelParams& p) {
    const i64 rows = p.shape_out[0] * p.shape_out[1];
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const i64 z_out = quotient(row, p.shape_out[1]), y_out = row - z_out * p.shape_out[1];
        const i64 z = p.first_out[0] + z_out, y = p.first_out[1] + y_out;
        const i64 z_low = p.taps[0].low[z] - p.first_in[0], y_low = p.taps[1].low[y] - p.first_in[1];
        const i64 z_high = z_low + p.taps[0].step, y_high = y_low + p.taps[1].step;
        const float z_weight = p.taps[0].weight_low[z], z_other = p.taps[0].weight_high[z];
        const float y_weight = p.taps[1].weight_low[y], y_other = p.taps[1].weight_high[y];
        for (i64 x = at.x(); x < p.shape_out[2]; x += at.x_step()) {
            const i64 x_low = p.is_width_kept ? x : p.taps[2].low[x], x_high = x_low + p.taps[2].step;
            const float x_weight = p.is_width_kept ? 1.0f : p.taps[2].weight_low[x];
            const float x_other = p.is_width_kept ? 0.0f : p.taps[2].weight_high[x];
            float best = -infinity();
            u32 label = 0;
            for (i64 head = 0; head < p.heads; ++head) {
                const auto along_x = [&](i64 z_in, i64 y_in) {
                    const Row from{p.logits, p.type, row_at(p.stride, head, z_in, y_in)};
                    return from.value(p, x_low, x_high, x_weight, x_other);
                };
                float low = along_x(z_low, y_low), high = along_x(z_low, y_high);
                if (z_other != 0) {
                    low = low * z_weight + along_x(z_high, y_low) * z_other;
                    high = high * z_weight + along_x(z_high, y_high) * z_other;
                }
                float value = low * y_weight + high * y_other;
                value = p.rounds_to_half ? round_to_half(value) : value;
                if (p.regions) {
                    label = value > kHalfProbability ? static_cast<u32>(p.regions[head]) : label;
                } else if (value > best) {
                    best = value;
                    label = static_cast<u32>(head);
                }
            }
            store_label(p.labels, z_out, y_out, x, label);
        }
    }
}

// One head, resampled by other means: argmax keeps the largest value so far in `best`, which starts as -infinity
struct HeadParams {
    const float* values;  // shape, contiguous
    float* best;          // null: `label` is painted where the value's sigmoid is above one half
    i64 shape[3];
    i64 label;
    i64 is_first;  // best holds nothing yet
    i64 rounds_to_half;
    LabelMap labels;
};

template <class At>
FNN_HD void label_head(const At& at, const HeadParams& p) {
    const i64 rows = p.shape[0] * p.shape[1];
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        const i64 z = quotient(row, p.shape[1]), y = row - z * p.shape[1];
        for (i64 x = at.x(); x < p.shape[2]; x += at.x_step()) {
            const i64 i = row * p.shape[2] + x;
            const float value = p.rounds_to_half ? round_to_half(p.values[i]) : p.values[i];
            if (!p.best) {
                if (value > kHalfProbability) store_label(p.labels, z, y, x, static_cast<u32>(p.label));
                continue;
            }
            const float best = p.is_first ? -infinity() : p.best[i];
            if (value > best) store_label(p.labels, z, y, x, static_cast<u32>(p.label));
            p.best[i] = value > best ? value : best;
        }
    }
}

}  // namespace fastnnunet::cuda
