#include "core/label_maps.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>

#include "core/components.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

// A contiguous volume of its own.
template <class T>
struct Owned {
    explicit Owned(const Index& shape)
        : values(new T[std::max<std::int64_t>(1, shape[0] * shape[1] * shape[2])]),
          view{values.get(), shape, {shape[1] * shape[2], shape[2]}} {}

    std::unique_ptr<T[]> values;
    Volume<T> view;

    Volume<const T> read() const { return {view.data, view.shape, view.stride}; }
};

// body(row of a, row of b) for every row
template <class A, class B, class Body>
void for_each_row(const Volume<A>& a, const Volume<B>& b, int threads, const Body& body) {
    parallel_for(a.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < a.shape[1]; ++y) body(a.row(z, y), b.row(z, y));
    });
}

AxisOperators operators(const Index& in, const Index& out, const std::array<int, 3>& orders) {
    const auto along = [&](int axis) { return AxisOperator(in[axis], out[axis], orders[axis], Convention::scipy); };
    return {along(0), along(1), along(2)};
}

std::vector<std::int32_t> distinct(const Volume<const std::int32_t>& labels) {
    std::vector<std::int32_t> found;
    for (std::int64_t row = 0; row < labels.rows(); ++row) {
        std::int32_t last = found.empty() ? 0 : found.back();
        for (std::int64_t x = 0; x < labels.shape[2]; ++x) {
            const std::int32_t label = labels.row(row)[x];
            if (!found.empty() && label == last) continue;
            last = label;
            if (std::find(found.begin(), found.end(), label) == found.end()) found.push_back(label);
        }
    }
    std::sort(found.begin(), found.end());
    return found;
}

// Sets `out` in plane to the label whose interpolated indicator is the largest.
void label_planes(const Volume<const std::int32_t>& labels, const Owned<double>& out, const std::array<int, 3>& orders,
                  int threads) {
    const std::int64_t width = out.view.shape[2];
    const AxisOperators along = operators(labels.shape, out.view.shape, orders);
    Owned<float> indicator(labels.shape);
    Owned<double> nearest(out.view.shape), best(out.view.shape), score(out.view.shape);
    std::copy(out.values.get(), out.values.get() + out.view.size(), nearest.values.get());
    bool is_first = true;
    for (const std::int32_t label : distinct(labels)) {
        for_each_row(labels, indicator.view, threads, [&](const std::int32_t* from, float* to) {
            for (std::int64_t x = 0; x < labels.shape[2]; ++x) to[x] = from[x] == label ? 1.0f : 0.0f;
        });
        resample(indicator.read(), is_first ? best.view : score.view, along, Clip::none, threads);
        parallel_for(out.view.rows(), threads, [&](std::int64_t row) {
            double *to = out.view.row(row), *highest = best.view.row(row);
            const double *here = score.view.row(row), *near = nearest.view.row(row);
            for (std::int64_t x = 0; x < width; ++x) {
                if (is_first) {
                    to[x] = label;
                    continue;
                }
                if (here[x] > highest[x] || (here[x] == highest[x] && near[x] == label)) to[x] = label;
                highest[x] = std::max(highest[x], here[x]);
            }
        });
        is_first = false;
    }
}

// Of every label but 0 that occurs, in order, its bounding box
template <class Label>
std::vector<std::pair<std::int64_t, Box>> boxes_of(const Volume<Label>& map) {
    constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
    std::vector<Box> boxes(std::numeric_limits<Label>::max() + std::size_t{1}, Box{{kNone, kNone, kNone}, {0, 0, 0}});
    for (std::int64_t z = 0; z < map.shape[0]; ++z) {
        for (std::int64_t y = 0; y < map.shape[1]; ++y) {
            const Label* row = map.row(z, y);
            for (std::int64_t x = 0; x < map.shape[2]; ++x) {
                if (row[x] == 0) continue;
                Box& box = boxes[row[x]];
                const Index at{z, y, x};
                for (int axis = 0; axis < 3; ++axis) {
                    box.start[axis] = std::min(box.start[axis], at[axis]);
                    box.stop[axis] = std::max(box.stop[axis], at[axis] + 1);
                }
            }
        }
    }
    std::vector<std::pair<std::int64_t, Box>> found;
    for (std::size_t label = 1; label < boxes.size(); ++label) {
        if (boxes[label].stop[0] > 0) found.emplace_back(static_cast<std::int64_t>(label), boxes[label]);
    }
    return found;
}

template <class T>
Volume<T> part(const Volume<T>& whole, const Box& box) {
    return {whole.row(box.start[0], box.start[1]) + box.start[2],
            {box.stop[0] - box.start[0], box.stop[1] - box.start[1], box.stop[2] - box.start[2]},
            whole.stride};
}

// 1 where `is_in(label)`
template <class Label, class IsIn>
Owned<std::uint8_t> mask_of(const Volume<Label>& map, int threads, const IsIn& is_in) {
    Owned<std::uint8_t> mask(map.shape);
    for_each_row(map, mask.view, threads, [&](const Label* from, std::uint8_t* to) {
        for (std::int64_t x = 0; x < map.shape[2]; ++x) to[x] = is_in(from[x]);
    });
    return mask;
}

// Voxels of a mask whose component has fewer than `least(sizes)` voxels become `value`.
template <class Label, class Least>
void replace_small(const Volume<Label>& map, const Owned<std::uint8_t>& mask, Label value, int threads,
                   const Least& least) {
    Owned<std::int32_t> components(map.shape);
    const std::vector<std::int64_t> sizes = label_components(mask.read(), 3, components.view, threads);
    if (sizes.empty()) return;
    const std::int64_t enough = least(sizes);
    for_each_row(map, components.view, threads, [&](Label* to, const std::int32_t* component) {
        for (std::int64_t x = 0; x < map.shape[2]; ++x) {
            if (component[x] > 0 && sizes[component[x] - 1] < enough) to[x] = value;
        }
    });
}

std::int64_t volume_of(const Box& box) {
    return (box.stop[0] - box.start[0]) * (box.stop[1] - box.start[1]) * (box.stop[2] - box.start[2]);
}

bool contains(const std::vector<std::int64_t>& labels, std::int64_t label) {
    return std::find(labels.begin(), labels.end(), label) != labels.end();
}

// Holes of a single plane: above and below it is no way out.
void fill_plane(const Volume<std::uint8_t>& plane, int threads) {
    Owned<std::uint8_t> between({3, plane.shape[1], plane.shape[2]});
    std::fill(between.values.get(), between.values.get() + between.view.size(), std::uint8_t{1});
    const Volume<std::uint8_t> middle{between.view.row(1, 0), plane.shape, between.view.stride};
    const auto copy = [&](const std::uint8_t* from, std::uint8_t* to) { std::copy(from, from + plane.shape[2], to); };
    for_each_row(plane, middle, 1, copy);
    fill_holes(between.view, threads);
    for_each_row(middle, plane, 1, copy);
}

}  // namespace

void resample_labels(const Volume<const std::int32_t>& labels, const Volume<std::int32_t>& out,
                     const ResamplePlan& plan, int threads) {
    if (out.shape != plan.shape_out) throw std::invalid_argument("labels: the result has not the planned shape");
    Index in_plane = plan.shape_out;
    if (plan.separate_axis) in_plane[*plan.separate_axis] = labels.shape[*plan.separate_axis];
    constexpr std::array<int, 3> kNearest{0, 0, 0};
    Owned<float> values(labels.shape);
    for_each_row(labels, values.view, threads, [&](const std::int32_t* from, float* to) {
        for (std::int64_t x = 0; x < labels.shape[2]; ++x) to[x] = static_cast<float>(from[x]);
    });
    Owned<double> planes(in_plane), result(plan.shape_out);
    resample(values.read(), planes.view, operators(labels.shape, in_plane, kNearest), Clip::none, threads);
    if (in_plane != labels.shape) label_planes(labels, planes, plan.orders, threads);
    Owned<float> single(in_plane);
    for_each_row(planes.view, single.view, threads, [&](const double* from, float* to) {
        for (std::int64_t x = 0; x < in_plane[2]; ++x) to[x] = static_cast<float>(from[x]);
    });
    resample(single.read(), result.view, operators(in_plane, plan.shape_out, kNearest), Clip::none, threads);
    for_each_row(result.view, out, threads, [&](const double* from, std::int32_t* to) {
        for (std::int64_t x = 0; x < out.shape[2]; ++x) to[x] = static_cast<std::int32_t>(from[x]);
    });
}

template <class Label>
void keep_largest(const Volume<Label>& map, const std::vector<std::int64_t>& labels, std::int64_t background,
                  int threads) {
    std::vector<std::uint8_t> is_wanted(std::numeric_limits<Label>::max() + std::size_t{1}, 0);
    for (const std::int64_t label : labels) {
        if (label >= 0 && label < static_cast<std::int64_t>(is_wanted.size())) is_wanted[label] = 1;
    }
    const auto mask = mask_of(map, threads, [&](Label label) { return is_wanted[label]; });
    replace_small(map, mask, static_cast<Label>(background), threads,
                  [](const std::vector<std::int64_t>& sizes) { return *std::max_element(sizes.begin(), sizes.end()); });
}

template <class Label>
void remove_small(const Volume<Label>& map, std::int64_t min_voxels, int threads) {
    for (const auto& [label, box] : boxes_of(map)) {
        const Volume<Label> inside = part(map, box);
        const auto mask = mask_of(inside, threads, [wanted = label](Label one) { return one == wanted; });
        replace_small(inside, mask, Label{0}, threads, [&](const std::vector<std::int64_t>&) { return min_voxels; });
    }
}

template <class Label>
void fill_label_holes(const Volume<Label>& map, const std::vector<std::int64_t>& labels, int threads) {
    auto wanted = boxes_of(map);
    wanted.erase(
        std::remove_if(wanted.begin(), wanted.end(), [&](const auto& entry) { return !contains(labels, entry.first); }),
        wanted.end());
    std::stable_sort(wanted.begin(), wanted.end(),
                     [](const auto& a, const auto& b) { return volume_of(a.second) < volume_of(b.second); });
    for (const auto& [label, box] : wanted) {
        const Volume<Label> inside = part(map, box);
        const auto filled = mask_of(inside, threads, [wanted_label = label](Label one) { return one == wanted_label; });
        if (map.shape[0] == 1) {
            fill_plane(filled.view, threads);
        } else {
            fill_holes(filled.view, threads);
        }
        for_each_row(inside, filled.view, threads, [&, value = label](Label* to, const std::uint8_t* is_filled) {
            for (std::int64_t x = 0; x < inside.shape[2]; ++x) {
                if (is_filled[x] && to[x] == 0) to[x] = static_cast<Label>(value);
            }
        });
    }
}

#define FASTNNUNET_INSTANTIATE(Label)                                                                      \
    template void keep_largest(const Volume<Label>&, const std::vector<std::int64_t>&, std::int64_t, int); \
    template void remove_small(const Volume<Label>&, std::int64_t, int);                                   \
    template void fill_label_holes(const Volume<Label>&, const std::vector<std::int64_t>&, int);
FASTNNUNET_INSTANTIATE(std::uint8_t)
FASTNNUNET_INSTANTIATE(std::uint16_t)
#undef FASTNNUNET_INSTANTIATE

}  // namespace fastnnunet
