#include "core/resample.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "core/half.hpp"
#include "core/rows.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

constexpr std::int64_t kColumnLanes = 64;  // columns worked on at once: a block stays in the second level cache
constexpr std::int64_t kRowLanes = 16;     // rows worked on at once, transposed

struct Limits {
    double low = -std::numeric_limits<double>::infinity();
    double high = std::numeric_limits<double>::infinity();

    double apply(double value) const { return value < low ? low : (value > high ? high : value); }
};

struct Scratch {
    std::vector<double> samples;
    std::vector<double> combined;
    std::vector<double> plane;

    static double* at_least(std::vector<double>& buffer, std::int64_t size) {
        if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(size);
        return buffer.data();
    }
};

double to_double(double value) { return value; }
double to_double(float value) { return value; }
double to_double(Half value) { return to_float(value); }

template <class T>
struct Rows {  // a matrix whose rows may lie apart
    T* data;
    std::int64_t stride;
};

// Applies the operator to `count` lines, `most` side by side at a time: load(first line, lanes, samples) fills (size_in,
// lanes), store(first line, lanes, values) takes (size_out, lanes).
template <class Load, class Store>
void in_lanes(const AxisOperator& op, std::int64_t count, std::int64_t most, Scratch& scratch, const Load& load,
              const Store& store) {
    double* samples = Scratch::at_least(scratch.samples, op.padded_size() * most);
    double* combined = Scratch::at_least(scratch.combined, op.size_out() * most);
    for (std::int64_t first = 0; first < count; first += most) {
        const std::int64_t lanes = std::min(most, count - first);
        load(first, lanes, samples + op.padding() * lanes);
        op.prefilter(samples, lanes);
        op.combine(samples, combined, lanes);
        store(first, lanes, combined);
    }
}

// Along the rows' index: neighbouring columns are neighbours in memory.
template <class In, class Out>
void along_columns(const AxisOperator& op, Rows<const In> in, Rows<Out> out, std::int64_t width, const Limits& limits,
                   Scratch& scratch) {
    const auto load = [&](std::int64_t x, std::int64_t lanes, double* to) {
        for (std::int64_t i = 0; i < op.size_in(); ++i, to += lanes) {
            const In* from = in.data + i * in.stride + x;
            for (std::int64_t lane = 0; lane < lanes; ++lane) to[lane] = to_double(from[lane]);
        }
    };
    const auto store = [&](std::int64_t x, std::int64_t lanes, double* from) {
        for (std::int64_t i = 0; i < op.size_out(); ++i, from += lanes) {
            if (op.sample(i) >= 0) {
                const In* sample = in.data + op.sample(i) * in.stride + x;
                for (std::int64_t lane = 0; lane < lanes; ++lane) from[lane] = to_double(sample[lane]);
            }
            Out* to = out.data + i * out.stride + x;
            for (std::int64_t lane = 0; lane < lanes; ++lane) to[lane] = static_cast<Out>(limits.apply(from[lane]));
        }
    };
    in_lanes(op, width, kColumnLanes, scratch, load, store);
}

// Along each row: several rows side by side, so that the recursion of the spline has independent work.
template <class In, class Out>
void along_rows(const AxisOperator& op, Rows<const In> in, Rows<Out> out, std::int64_t height, const Limits& limits,
                Scratch& scratch) {
    const auto load = [&](std::int64_t y, std::int64_t lanes, double* to) {
        const In* from = in.data + y * in.stride;
        for (std::int64_t i = 0; i < op.size_in(); ++i) {
            for (std::int64_t lane = 0; lane < lanes; ++lane) to[i * lanes + lane] = to_double(from[lane * in.stride + i]);
        }
    };
    const auto store = [&](std::int64_t y, std::int64_t lanes, const double* combined) {
        const In* from = in.data + y * in.stride;
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
            Out* row = out.data + (y + lane) * out.stride;
            for (std::int64_t i = 0; i < op.size_out(); ++i) {
                const std::int32_t sample = op.sample(i);
                const double value = sample >= 0 ? to_double(from[lane * in.stride + sample]) : combined[i * lanes + lane];
                row[i] = static_cast<Out>(limits.apply(value));
            }
        }
    };
    in_lanes(op, height, kRowLanes, scratch, load, store);
}

template <class In, class Out>
void resample_plane(const AxisOperator& op_y, const AxisOperator& op_x, Rows<const In> in, Rows<Out> out,
                    const Limits& limits, Scratch& scratch) {
    if (op_x.is_identity()) return along_columns(op_y, in, out, op_x.size_in(), limits, scratch);
    if (op_y.is_identity()) return along_rows(op_x, in, out, op_y.size_in(), limits, scratch);
    const Limits none;
    if (op_y.size_out() < op_y.size_in()) {  // the axis that shrinks first: less work for the other
        const std::int64_t width = op_x.size_in();
        double* between = Scratch::at_least(scratch.plane, op_y.size_out() * width);
        along_columns(op_y, in, Rows<double>{between, width}, width, none, scratch);
        along_rows(op_x, Rows<const double>{between, width}, out, op_y.size_out(), limits, scratch);
    } else {
        const std::int64_t width = op_x.size_out();
        double* between = Scratch::at_least(scratch.plane, op_y.size_in() * width);
        along_rows(op_x, in, Rows<double>{between, width}, op_y.size_in(), none, scratch);
        along_columns(op_y, Rows<const double>{between, width}, out, width, limits, scratch);
    }
}

template <class T>
Rows<T> plane_of(const Volume<T>& volume, std::int64_t z) {
    return {volume.row(z, 0), volume.stride[1]};
}

template <class In>
Limits limits_of_plane(const Volume<const In>& in, std::int64_t z) {
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (std::int64_t y = 0; y < in.shape[1]; ++y) extend_limits(in.row(z, y), in.shape[2], low, high);
    return low <= high ? Limits{low, high} : Limits{};
}

template <class In>
Limits limits_of(const Volume<const In>& in, int threads) {
    std::vector<Limits> planes(in.shape[0]);
    parallel_for(in.shape[0], threads, [&](std::int64_t z) { planes[z] = limits_of_plane(in, z); });
    Limits all = planes[0];
    for (const Limits& plane : planes) {
        all.low = std::min(all.low, plane.low);
        all.high = std::max(all.high, plane.high);
    }
    return all;
}

template <class In, class Out>
void resample_along_z(const AxisOperator& op, const Volume<const In>& in, const Volume<Out>& out, const Limits& limits,
                      int threads) {
    parallel_for<Scratch>(in.shape[1], threads, [&](std::int64_t y, Scratch& scratch) {
        along_columns(op, Rows<const In>{in.row(0, y), in.stride[0]}, Rows<Out>{out.row(0, y), out.stride[0]},
                      in.shape[2], limits, scratch);
    });
}

struct Intermediate {
    std::unique_ptr<double[]> values;
    Volume<double> volume;

    explicit Intermediate(std::array<std::int64_t, 3> shape)
        : values(new double[shape[0] * shape[1] * shape[2]]),  // not initialised: every value is written
          volume{values.get(), shape, {shape[1] * shape[2], shape[2]}} {}

    Volume<const double> read() const { return {volume.data, volume.shape, volume.stride}; }
};

}  // namespace

template <class In, class Out>
void resample(const Volume<const In>& in, const Volume<Out>& out, const AxisOperators& operators, Clip clip,
              int threads) {
    const AxisOperator &op_z = operators[0], &op_y = operators[1], &op_x = operators[2];
    for (int axis = 0; axis < 3; ++axis) {
        if (in.shape[axis] != operators[axis].size_in() || out.shape[axis] != operators[axis].size_out()) {
            throw std::invalid_argument("resampling: arrays do not have the shapes of the operators");
        }
    }
    const Limits whole = clip == Clip::whole ? limits_of(in, threads) : Limits{};
    const auto plane_limits = [&](std::int64_t z) { return clip == Clip::per_plane ? limits_of_plane(in, z) : whole; };

    if (op_z.is_selection()) {
        // every input plane that is used, once
        std::vector<std::int64_t> starts;
        for (std::int64_t z = 0; z < op_z.size_out(); ++z) {
            if (z == 0 || op_z.first()[z] != op_z.first()[z - 1]) starts.push_back(z);
        }
        parallel_for<Scratch>(starts.size(), threads, [&](std::int64_t group, Scratch& scratch) {
            const std::int64_t start = starts[group], from = op_z.first()[start];
            resample_plane(op_y, op_x, plane_of(in, from), plane_of(out, start), plane_limits(from), scratch);
            for (std::int64_t z = start + 1; z < op_z.size_out() && op_z.first()[z] == from; ++z) {
                for (std::int64_t y = 0; y < out.shape[1]; ++y) {
                    std::copy(out.row(start, y), out.row(start, y) + out.shape[2], out.row(z, y));
                }
            }
        });
    } else if (op_y.is_identity() && op_x.is_identity()) {
        resample_along_z(op_z, in, out, whole, threads);  // planes as they are lie within their own limits
    } else if (clip != Clip::per_plane && op_z.size_out() * in.shape[1] * in.shape[2] <
                                              in.shape[0] * out.shape[1] * out.shape[2]) {
        const Intermediate between({out.shape[0], in.shape[1], in.shape[2]});
        resample_along_z(op_z, in, between.volume, Limits{}, threads);
        const Volume<const double> read = between.read();
        parallel_for<Scratch>(out.shape[0], threads, [&](std::int64_t z, Scratch& scratch) {
            resample_plane(op_y, op_x, plane_of(read, z), plane_of(out, z), whole, scratch);
        });
    } else {
        const Intermediate between({in.shape[0], out.shape[1], out.shape[2]});
        parallel_for<Scratch>(in.shape[0], threads, [&](std::int64_t z, Scratch& scratch) {
            const Limits limits = clip == Clip::per_plane ? plane_limits(z) : Limits{};
            resample_plane(op_y, op_x, plane_of(in, z), plane_of(between.volume, z), limits, scratch);
        });
        resample_along_z(op_z, between.read(), out, whole, threads);
    }
}

template void resample(const Volume<const float>&, const Volume<float>&, const AxisOperators&, Clip, int);
template void resample(const Volume<const float>&, const Volume<double>&, const AxisOperators&, Clip, int);
template void resample(const Volume<const Half>&, const Volume<float>&, const AxisOperators&, Clip, int);

}  // namespace fastnnunet
