#include "core/resample_plan.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>

#include "core/threads.hpp"

namespace fastnnunet {
namespace {

constexpr std::int64_t kLine = 16;  // voxels along x at once: what is read and what is written stays in the cache

// The axes in the order in which `axis` (1 or 2) comes first, so that planes lie across the first.
std::array<int, 3> axis_first(int axis) { return {axis, 0, 3 - axis}; }

Index in_order(const Index& shape, const std::array<int, 3>& axes) {
    return {shape[axes[0]], shape[axes[1]], shape[axes[2]]};
}

// body(value, its place in a contiguous volume of the same values whose axes are `axes` of this one)
template <class T, class U, class Body>
void for_each_pair(const Volume<T>& volume, U* other, const std::array<int, 3>& axes, int threads, const Body& body) {
    const Index shape = in_order(volume.shape, axes);
    std::array<std::int64_t, 3> step{};  // in `other`, along the axes of the volume
    step[axes[0]] = shape[1] * shape[2];
    step[axes[1]] = shape[2];
    step[axes[2]] = 1;
    parallel_for(volume.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t first = 0; first < volume.shape[2]; first += kLine) {
            const std::int64_t end = std::min(first + kLine, volume.shape[2]);
            for (std::int64_t y = 0; y < volume.shape[1]; ++y) {
                T* row = volume.row(z, y);
                U* start = other + z * step[0] + y * step[1];
                for (std::int64_t x = first; x < end; ++x) body(row[x], start[x * step[2]]);
            }
        }
    });
}

template <class T>
Volume<T> contiguous(T* data, const Index& shape) {
    return {data, shape, {shape[1] * shape[2], shape[2]}};
}

template <class T>
std::unique_ptr<T[]> allocate(const Index& shape) {
    return std::unique_ptr<T[]>(new T[shape[0] * shape[1] * shape[2]]);  // not initialised: every value is written
}

}  // namespace

bool ResamplePlan::is_local() const { return *std::max_element(orders.begin(), orders.end()) <= 1; }

AxisOperators ResamplePlan::operators(const Index& shape_in) const {
    const auto along = [&](int axis) {
        return AxisOperator(shape_in[axis], shape_out[axis], orders[axis], convention);
    };
    return {along(0), along(1), along(2)};
}

Index resampled_shape(const Index& shape, const Spacing& spacing, const Spacing& target) {
    constexpr double kMost = 9007199254740992.0;  // 2^53
    Index out{};
    for (int axis = 0; axis < 3; ++axis) {
        const double size = spacing[axis] / target[axis] * static_cast<double>(shape[axis]);
        if (!(size >= 0)) throw std::invalid_argument("a spacing must be a positive number of millimetres");
        out[axis] = std::llrint(std::min(size, kMost));
    }
    return out;
}

std::optional<int> coarse_axis(const Spacing& spacing, const Spacing& target, std::optional<bool> force,
                               double threshold) {
    const auto highest = [](const Spacing& of) { return *std::max_element(of.begin(), of.end()); };
    const auto is_coarse = [&](const Spacing& of) {
        return highest(of) / *std::min_element(of.begin(), of.end()) > threshold;
    };
    if (force ? !*force : !is_coarse(spacing) && !is_coarse(target)) return std::nullopt;
    const Spacing& chosen = force || is_coarse(spacing) ? spacing : target;
    std::optional<int> found;
    for (int axis = 0; axis < 3; ++axis) {
        if (highest(chosen) / chosen[axis] != 1) continue;
        if (found) return std::nullopt;
        found = axis;
    }
    return found;
}

std::optional<ResamplePlan> plan_resampling(const ResampleSpec& spec, const Index& shape, const Index& shape_out,
                                            const Spacing& spacing, const Spacing& spacing_out) {
    if (shape == shape_out) return std::nullopt;
    ResamplePlan plan{spec.convention, {0, 0, 0}, {}, Clip::none, shape_out};
    plan.separate_axis = coarse_axis(spacing, spacing_out, spec.force_separate_z, spec.anisotropy_threshold);
    int in_plane = 0;
    for (int axis = 0; axis < 3; ++axis) {
        const bool is_separate = plan.separate_axis == axis;
        if (shape[axis] != shape_out[axis]) plan.orders[axis] = is_separate ? spec.order_z : spec.order;
        if (!is_separate) in_plane = std::max(in_plane, plan.orders[axis]);
    }
    // order 1 cannot leave the range of its input
    if (in_plane > 1) plan.clip = plan.separate_axis ? Clip::per_plane : Clip::whole;
    return plan;
}

template <class In>
void resample(const Volume<const In>& in, const Volume<float>& out, const ResamplePlan& plan, int threads) {
    if (out.shape != plan.shape_out) throw std::invalid_argument("resampling: the result has not the planned shape");
    const AxisOperators operators = plan.operators(in.shape);
    if (plan.clip != Clip::per_plane || plan.separate_axis.value_or(0) == 0) {
        return resample(in, out, operators, plan.clip, threads);
    }
    const std::array<int, 3> axes = axis_first(*plan.separate_axis);
    const Index shape_in = in_order(in.shape, axes), shape_out = in_order(out.shape, axes);
    const auto from = allocate<In>(shape_in);
    const auto to = allocate<float>(shape_out);
    for_each_pair(in, from.get(), axes, threads, [](const In& value, In& copy) { copy = value; });
    resample(contiguous<const In>(from.get(), shape_in), contiguous(to.get(), shape_out),
             AxisOperators{operators[axes[0]], operators[axes[1]], operators[axes[2]]}, plan.clip, threads);
    for_each_pair(out, to.get(), axes, threads, [](float& value, const float& copy) { value = copy; });
}

template void resample(const Volume<const float>&, const Volume<float>&, const ResamplePlan&, int);
template void resample(const Volume<const Half>&, const Volume<float>&, const ResamplePlan&, int);

}  // namespace fastnnunet
