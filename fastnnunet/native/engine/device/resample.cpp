// Resampling: the passes of core/resample.cpp along one axis after another, on a GPU.
//
// Tables of weights are the core's own, intermediate values float64 as there. Lines of a spline are filtered in scratch
// memory, so many at once as kScratchBytes hold.
#include <algorithm>
#include <cmath>

#include "device/volumes.hpp"

namespace fastnnunet::engine {
namespace {

constexpr std::int64_t kScratchBytes = std::int64_t{1} << 26;

// One axis resampled, and whether values are clipped to the limits of the input then
struct AxisPass {
    int axis;
    bool clips;
};

// The axes in the core's order: planes across the first axis, and along it before or after, whichever is less.
std::vector<AxisPass> passes(const Index& in, const Index& out, const AxisOperators& ops, Clip clip,
                             std::optional<int> separate) {
    const int z = clip == Clip::per_plane ? separate.value_or(0) : 0;
    const int y = z == 0 ? 1 : 0, x = z == 2 ? 1 : 2;
    std::vector<int> in_plane;
    for (const int axis : out[y] < in[y] ? std::array<int, 2>{y, x} : std::array<int, 2>{x, y}) {
        if (!ops[axis].is_identity()) in_plane.push_back(axis);
    }
    std::vector<AxisPass> made;
    const auto planes = [&](bool clips) {
        for (const int axis : in_plane) made.push_back({axis, clips && axis == in_plane.back()});
    };
    const auto along = [&](bool clips) {
        if (!ops[z].is_identity()) made.push_back({z, clips});
    };
    if (ops[z].is_selection()) {
        planes(clip != Clip::none);
        along(false);
    } else if (in_plane.empty()) {
        along(clip == Clip::whole);
    } else if (clip != Clip::per_plane && out[z] * in[y] * in[x] < in[z] * out[y] * out[x]) {
        along(false);
        planes(clip != Clip::none);
    } else {
        planes(clip == Clip::per_plane);
        along(clip == Clip::whole);
    }
    return made;
}

// Of two axes or three, the plane axis first, then those whose neighbours lie further apart
template <std::size_t N>
void sort_axes(std::array<int, N>& axes, const DeviceVolume& volume, std::optional<int> plane_axis) {
    std::stable_sort(axes.begin(), axes.end(), [&](int a, int b) {
        const bool is_plane = plane_axis == a, other = plane_axis == b;
        return is_plane != other ? is_plane : volume.stride[a] > volume.stride[b];
    });
}

cuda::Lines lines_of(const DeviceVolume& volume, int axis, int outer, int inner) {
    return {volume.shape[inner], volume.stride[outer], volume.stride[inner], volume.stride[axis]};
}

// One axis of a volume; `limits`: null, or those of planes across `plane_axis`, or one
void apply(const Stream& stream, const DeviceVolume& in, const AxisOperator& op, const Stream::Tables& tables, int axis,
           const DeviceVolume& out, const cuda::Limits* limits, std::optional<int> plane_axis) {
    std::array<int, 2> others = axis == 0 ? std::array<int, 2>{1, 2} : std::array<int, 2>{0, 3 - axis};
    sort_axes(others, in, plane_axis);
    const auto [outer, inner] = others;  // limits are counted along the outer axis
    const std::int64_t lines = in.shape[outer] * in.shape[inner];
    const bool is_along_line = in.stride[axis] == 1;
    cuda::CombineParams params{};
    params.in = in.data;
    params.in_type = in.type;
    params.in_lines = lines_of(in, axis, outer, inner);
    params.first = tables.first.get();
    params.weights = tables.weights.get();
    params.sample = tables.sample.get();
    params.limits = limits;
    params.limits_step = plane_axis ? 1 : 0;
    params.out = out.data;
    params.out_type = out.type;
    params.out_lines = lines_of(out, axis, outer, inner);
    params.count = lines;
    params.size_out = op.size_out();
    params.taps = op.taps();
    params.is_along_line = is_along_line;
    const auto combine = [&] {
        stream.start_combine_lines(is_along_line ? grid_of(params.size_out, params.count)
                                                 : grid_of(params.count, params.size_out), params);
    };
    if (op.is_local()) return combine();
    const std::int64_t padded = op.padded_size();
    const std::int64_t at_once = std::max<std::int64_t>(1, std::min(lines, kScratchBytes / (8 * padded)));
    const DeviceMemory<double> scratch = stream.memory<double>(at_once * padded);
    for (std::int64_t first = 0; first < lines; first += at_once) {
        const std::int64_t count = std::min(at_once, lines - first);
        params.samples = {scratch.get(), is_along_line ? 1 : count, is_along_line ? padded : 1};
        params.first_line = first;
        params.count = count;
        const cuda::LoadParams load{in.data,      in.type,        params.in_lines, first,
                                    count,        op.size_in(),   params.samples,  is_along_line};
        stream.start_load_lines(is_along_line ? grid_of(padded, count) : grid_of(count, padded), load);
        cuda::PrefilterParams filter{};
        filter.samples = params.samples;
        filter.size = padded;
        filter.lines = count;
        filter.poles = static_cast<cuda::i64>(op.poles().size());
        for (std::size_t i = 0; i < op.poles().size(); ++i) {
            filter.pole[i] = op.poles()[i];
            filter.pole_n[i] = std::pow(op.poles()[i], static_cast<double>(padded));
        }
        stream.start_prefilter(grid_of_blocks((count + cuda::kBlockThreads - 1) / cuda::kBlockThreads), filter);
        combine();
    }
}

}  // namespace

DeviceMemory<cuda::Limits> limits_of(const Stream& stream, const DeviceVolume& volume, std::optional<int> plane_axis) {
    std::array<int, 3> axes{0, 1, 2};
    sort_axes(axes, volume, plane_axis);
    const DeviceVolume ordered = volume.transposed(axes);
    const Index& shape = ordered.shape;
    DeviceMemory<cuda::Limits> limits = stream.new_limits(plane_axis ? shape[0] : 1);
    cuda::LimitsParams params{};
    params.data = ordered.data;
    params.limits = limits.get();
    params.type = ordered.type;
    std::copy(shape.begin(), shape.end(), params.shape);
    std::copy(ordered.stride.begin(), ordered.stride.end(), params.stride);
    params.planes = plane_axis ? 1 : shape[0];
    stream.start_find_limits(grid_of(shape[2], shape[1], shape[0], true), params);
    return limits;
}

void resample(const Stream& stream, const DeviceVolume& in, const std::optional<ResamplePlan>& plan,
              const DeviceVolume& out) {
    const auto order = [&](int axis) { return plan ? plan->orders[axis] : 0; };
    const Convention convention = plan ? plan->convention : Convention::scipy;
    const auto along = [&](int axis) { return AxisOperator(in.shape[axis], out.shape[axis], order(axis), convention); };
    const AxisOperators ops{along(0), along(1), along(2)};
    const Clip clip = plan ? plan->clip : Clip::none;
    const std::optional<int> separate = plan ? plan->separate_axis : std::nullopt;
    std::vector<AxisPass> todo = passes(in.shape, out.shape, ops, clip, separate);
    if (todo.empty()) todo.push_back({2, false});  // a copy, perhaps transposed
    DeviceMemory<cuda::Limits> limits;
    std::optional<int> plane_axis;
    if (std::any_of(todo.begin(), todo.end(), [](const AxisPass& one) { return one.clips; })) {
        if (clip == Clip::per_plane) plane_axis = separate.value_or(0);
        limits = limits_of(stream, in, plane_axis);
    }
    DeviceVolume from = in;
    DeviceMemory<double> held;  // what `from` is, after the first axis
    for (std::size_t i = 0; i < todo.size(); ++i) {
        const auto [axis, clips] = todo[i];
        DeviceMemory<double> made;
        DeviceVolume to = out;
        if (i + 1 < todo.size()) {
            Index shape = from.shape;
            shape[axis] = out.shape[axis];
            made = stream.memory<double>(voxels_of(shape));
            to = {made.get(), cuda::kDouble, shape, {shape[1] * shape[2], shape[2], 1}};
        }
        apply(stream, from, ops[axis], stream.tables(ops[axis], order(axis), convention), axis, to,
              clips ? limits.get() : nullptr, plane_axis);
        from = to;
        held = std::move(made);
    }
}

}  // namespace fastnnunet::engine
