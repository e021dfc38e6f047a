// One axis of a volume resampled by an operator of core/axis_operator.hpp, whose tables come from there.
//
// float64 inside, in the core's order, so results are its own to the bit. A volume is lines along the axis; a spline's
// lines are taken into float64 with their padding (`load_lines`), filtered (`prefilter`) and combined, so many at a time
// as the caller has memory for. Operators of order 0 and 1 are combined from the input itself. Strides are free, so a
// transposition is part of whatever axis comes first or last.
#pragma once

#include "body.hpp"

namespace fastnnunet::cuda {

constexpr i64 kSplinePadding = 12;

// Line n = outer * inners + inner of a volume begins at outer * outer_stride + inner * inner_stride.
struct Lines {
    i64 inners;
    i64 outer_stride, inner_stride;
    i64 stride;  // along the line
};
FNN_HD i64 line_start(const Lines& lines, i64 number) {
    const i64 outer = quotient(number, lines.inners);
    return outer * lines.outer_stride + (number - outer * lines.inners) * lines.inner_stride;
}

// float64 samples of lines: sample i of line n at i * stride + n * line_stride
struct Samples {
    double* data;
    i64 stride, line_stride;
};

struct LoadParams {
    const void* in;
    i64 type;
    Lines lines;
    i64 first, count;  // which lines
    i64 size_in;
    Samples samples;    // size_in + 2 * kSplinePadding of them
    i64 is_along_line;  // neighbouring threads take neighbours along the line, not neighbouring lines
};

template <class At>
FNN_HD void load_lines(const At& at, const LoadParams& p) {
    const i64 padded = p.size_in + 2 * kSplinePadding;
    const i64 rows = p.is_along_line ? p.count : padded, width = p.is_along_line ? padded : p.count;
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        for (i64 x = at.x(); x < width; x += at.x_step()) {
            const i64 line = p.is_along_line ? row : x, i = p.is_along_line ? x : row;
            i64 from = i - kSplinePadding;
            from = from < 0 ? 0 : least(from, p.size_in - 1);
            p.samples.data[i * p.samples.stride + line * p.samples.line_stride] =
                load(p.in, p.type, line_start(p.lines, p.first + line) + from * p.lines.stride);
        }
    }
}

// In place, a line by one thread: the recursions of core/axis_operator.cpp
struct PrefilterParams {
    Samples samples;
    i64 size;   // padded
    i64 lines;
    i64 poles;
    double pole[2], pole_n[2];  // pole_n: pole to the power of `size`
};

template <class At>
FNN_HD void prefilter(const At& at, const PrefilterParams& p) {
    const i64 step = p.samples.stride, count = p.size;
    for (i64 line = at.block() * kBlockThreads + at.in_block(); line < p.lines; line += at.blocks() * kBlockThreads) {
        double* samples = p.samples.data + line * p.samples.line_stride;
        for (i64 k = 0; k < p.poles; ++k) {
            const double pole = p.pole[k], pole_n = p.pole_n[k], first = samples[0];
            double sum = first + pole_n * samples[(count - 1) * step];
            double power = pole;
            for (i64 i = 1; i < count && (power < 0 ? -power : power) > 1e-20; ++i, power *= pole) {
                sum += power * (samples[i * step] + pole_n * samples[(count - 1 - i) * step]);
            }
            double value = first + sum * (pole / (1 - pole_n * pole_n));
            samples[0] = value;
            for (i64 i = 1; i < count; ++i) {
                value = samples[i * step] + pole * value;
                samples[i * step] = value;
            }
            value *= pole / (pole - 1);
            samples[(count - 1) * step] = value;
            for (i64 i = count - 2; i >= 0; --i) {
                value = pole * (value - samples[i * step]);
                samples[i * step] = value;
            }
        }
    }
}

// out[i] of each line = the sum of weights[i][tap] * samples[first[i] + tap], clipped
struct CombineParams {
    const void* in;
    i64 in_type;
    Lines in_lines;
    Samples samples;  // null: `in` itself
    const i32* first;
    const double* weights;  // (size_out, taps)
    const i32* sample;      // the input an output coincides with, or -1; null: none does
    const Limits* limits;   // per `outer` of a line, or one (limits_step 0); null: no limits
    i64 limits_step;
    void* out;
    i64 out_type;  // kFloat or kDouble
    Lines out_lines;
    i64 first_line, count;
    i64 size_out, taps;
    i64 is_along_line;
};

FNN_HD double clipped(double value, const Limits& limits) {
    if (limits.has_nan || limits.low > limits.high) return value;
    const double low = value_of_key(limits.low), high = value_of_key(limits.high);
    return value < low ? low : (value > high ? high : value);
}

template <class At>
FNN_HD void combine_lines(const At& at, const CombineParams& p) {
    const i64 rows = p.is_along_line ? p.count : p.size_out, width = p.is_along_line ? p.size_out : p.count;
    for (i64 row = at.row(); row < rows; row += at.row_step()) {
        for (i64 x = at.x(); x < width; x += at.x_step()) {
            const i64 i = p.is_along_line ? x : row, line = p.is_along_line ? row : x, number = p.first_line + line;
            const i64 in = line_start(p.in_lines, number), from = p.first[i];
            const double* weights = p.weights + i * p.taps;
            double value;
            if (p.sample && p.sample[i] >= 0) {
                value = load(p.in, p.in_type, in + p.sample[i] * p.in_lines.stride);
            } else if (p.samples.data) {
                const double* samples = p.samples.data + line * p.samples.line_stride + from * p.samples.stride;
                value = weights[0] * samples[0];
                for (i64 tap = 1; tap < p.taps; ++tap) value += weights[tap] * samples[tap * p.samples.stride];
            } else {
                value = weights[0] * load(p.in, p.in_type, in + from * p.in_lines.stride);
                for (i64 tap = 1; tap < p.taps; ++tap) {
                    value += weights[tap] * load(p.in, p.in_type, in + (from + tap) * p.in_lines.stride);
                }
            }
            if (p.limits) value = clipped(value, p.limits[quotient(number, p.in_lines.inners) * p.limits_step]);
            const i64 to = line_start(p.out_lines, number) + i * p.out_lines.stride;
            if (p.out_type == kDouble) {
                static_cast<double*>(p.out)[to] = value;
            } else {
                static_cast<float*>(p.out)[to] = static_cast<float>(value);
            }
        }
    }
}

}  // namespace fastnnunet::cuda
