// The core for Python: checks of arrays, no arithmetic. What works on arrays works without the interpreter's lock; arrays
// are never copied.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "bindings_arrays.hpp"
#include "core/accumulate.hpp"
#include "core/axis_operator.hpp"
#include "core/components.hpp"
#include "core/half.hpp"
#include "core/kl.hpp"
#include "core/label.hpp"
#include "core/label_maps.hpp"
#include "core/nonzero.hpp"
#include "core/normalize.hpp"
#include "core/probabilities.hpp"
#include "core/resample.hpp"
#include "core/resample_plan.hpp"
#include "core/sample.hpp"

using namespace fastnnunet;

void bind_decisions(nb::module_& module);  // bindings_decisions.cpp
void bind_locate(nb::module_& module);     // bindings_locate.cpp

namespace {

std::optional<Mask> mask_of(const std::optional<Array3<const bool>>& array) {
    if (!array) return std::nullopt;
    return bytes<const std::uint8_t>(*array);
}

AxisOperators operators(const Index& size_in, const Index& size_out, const std::array<int, 3>& orders, bool torch) {
    const Convention convention = torch ? Convention::torch : Convention::scipy;
    const auto along = [&](int axis) { return AxisOperator(size_in[axis], size_out[axis], orders[axis], convention); };
    return {along(0), along(1), along(2)};
}

template <class T>
Samples<T> samples(const Array3<T>& array) {
    const auto size = [&](int axis) { return static_cast<std::int64_t>(array.shape(axis)); };
    return {array.data(), size(0), size(1), size(2), array.stride(0), array.stride(1), array.stride(2)};
}

void bind_kl_classes(nb::module_& module) {
    module.def(
        "kl_classes",
        [](const Array3<const float>& logits, const Array3<const float>& soft, float temperature,
           const std::optional<Rows<const bool>>& mask,
           const Array3<float>& difference, int threads) {
            const Samples<const float> z = samples(logits), p = samples(soft);
            const Samples<float> d = samples(difference);
            require_contiguous_rows(soft);
            if (p.samples != z.samples || p.channels + 1 != z.channels || p.voxels != z.voxels || z.channels < 2 ||
                d.samples != z.samples || d.channels != z.channels || d.voxels != z.voxels ||
                (mask && (mask->shape(0) != logits.shape(0) || mask->shape(1) != logits.shape(2)))) {
                throw std::invalid_argument("logits, soft labels, mask and difference do not fit");
            }
            const auto* where = mask ? reinterpret_cast<const std::uint8_t*>(mask->data()) : nullptr;
            const nb::gil_scoped_release unlocked;
            const KLSum kl = kl_classes(z, p, where, temperature, d, threads);
            return std::pair(kl.sum, kl.voxels);
        },
        nb::arg("logits").noconvert(), nb::arg("soft").noconvert(), nb::arg("temperature"),
        nb::arg("mask").none().noconvert(), nb::arg("difference").noconvert(), nb::arg("threads"));
}

Grid grid_for(const Rows<const float>& grid, std::int64_t planes) {
    const Grid at{grid.data(), static_cast<std::int64_t>(grid.shape(0)), static_cast<std::int64_t>(grid.shape(1))};
    if (at.axes < 2 || at.axes > 3 || (at.axes == 2 && planes != 1)) {
        throw std::invalid_argument("a grid has 3 axes, or 2 for one plane");
    }
    return at;
}

void bind_sample(nb::module_& module) {
    module.def(
        "sample",
        [](const Array4<const float>& values, const Array4<const std::int16_t>& labels, const Rows<const float>& grid,
           std::int16_t outside, const Rows<float>& values_out, const Rows<std::int16_t>& labels_out, int threads) {
            const Volumes<const float> from = volumes(values);
            const Volumes<const std::int16_t> of = volumes(labels);
            const Grid at = grid_for(grid, from.shape[0]);
            if (from.shape != of.shape || values_out.shape(0) != values.shape(0) ||
                labels_out.shape(0) != labels.shape(0) || values_out.shape(1) != grid.shape(0) ||
                labels_out.shape(1) != grid.shape(0)) {
                throw std::invalid_argument("values, labels, grid and results do not fit");
            }
            const nb::gil_scoped_release unlocked;
            sample(from, of, at, outside, values_out.data(), labels_out.data(), threads);
        },
        nb::arg("values").noconvert(), nb::arg("labels").noconvert(), nb::arg("grid").noconvert(), nb::arg("outside"),
        nb::arg("values_out").noconvert(), nb::arg("labels_out").noconvert(), nb::arg("threads"));
    module.def(
        "sample_inside",
        [](const Array4<const float>& values, const Index& space, const Index& lower, const Rows<const float>& grid,
           float nothing, const Rows<float>& out, int threads) {
            const Volumes<const float> from = volumes(values);
            const Grid at = grid_for(grid, space[0]);
            if (out.shape(0) != values.shape(0) || out.shape(1) != grid.shape(0)) {
                throw std::invalid_argument("values, grid and result do not fit");
            }
            const nb::gil_scoped_release unlocked;
            sample_inside(from, space, lower, at, nothing, out.data(), threads);
        },
        nb::arg("values").noconvert(), nb::arg("space"), nb::arg("lower"), nb::arg("grid").noconvert(),
        nb::arg("nothing"), nb::arg("out").noconvert(), nb::arg("threads"));
}

template <class In, class Out>
void bind_resample(nb::module_& module) {
    module.def(
        "resample",
        [](const Array4<const In>& in, const Array4<Out>& out, const std::array<int, 3>& orders, bool torch,
           const std::string& clip, int threads) {
            const Volumes<const In> from = volumes(in);
            const Volumes<Out> to = volumes(out);
            if (from.count != to.count) throw std::invalid_argument("resampling: different numbers of channels");
            const Clip limits = clip == "whole" ? Clip::whole : clip == "per_plane" ? Clip::per_plane : Clip::none;
            const nb::gil_scoped_release unlocked;
            const AxisOperators along = operators(from.shape, to.shape, orders, torch);
            for (std::int64_t i = 0; i < from.count; ++i) resample(from[i], to[i], along, limits, threads);
        },
        nb::arg("values").noconvert(), nb::arg("out").noconvert(), nb::arg("orders"), nb::arg("torch"), nb::arg("clip"),
        nb::arg("threads"));
}

template <class In>
void bind_resample_planned(nb::module_& module) {
    module.def(
        "resample_planned",
        [](const Array4<const In>& in, const Array4<float>& out, const ResamplePlan& plan, int threads) {
            const Volumes<const In> from = volumes(in);
            const Volumes<float> to = volumes(out);
            if (from.count != to.count) throw std::invalid_argument("resampling: different numbers of channels");
            const nb::gil_scoped_release unlocked;
            for (std::int64_t i = 0; i < from.count; ++i) resample(from[i], to[i], plan, threads);
        },
        nb::arg("values").noconvert(), nb::arg("out").noconvert(), nb::arg("plan"), nb::arg("threads"));
}

template <class Logit, class Label>
void bind_label_logits(nb::module_& module) {
    module.def(
        "label_logits",
        [](const Array4<const Logit>& logits, const Array3<Label>& labels, const Index& size_in, const Index& size_out,
           const std::array<std::int64_t, 2>& first_in, const std::array<std::int64_t, 2>& first_out,
           const std::array<int, 3>& orders, bool torch, bool to_half,
           const std::optional<std::vector<std::uint32_t>>& regions, int threads) {
            const Volumes<const Logit> from = volumes(logits);
            const Volume<Label> to = volume(labels);
            const nb::gil_scoped_release unlocked;
            const LogitPlan plan{operators(size_in, size_out, orders, torch), to_half};
            label_logits(from, to, plan, Part{first_in, first_out}, regions, threads);
        },
        nb::arg("logits").noconvert(), nb::arg("labels").noconvert(), nb::arg("size_in"), nb::arg("size_out"),
        nb::arg("first_in"), nb::arg("first_out"), nb::arg("orders"), nb::arg("torch"), nb::arg("to_half"),
        nb::arg("regions").none(), nb::arg("threads"));
}

template <class Logit>
void bind_resample_planes(nb::module_& module) {
    module.def(
        "resample_planes",
        [](const Array4<const Logit>& logits, const Array4<float>& out, std::int64_t depth_out, std::int64_t first_plane,
           const std::array<int, 3>& orders, bool torch, bool to_half, int threads) {
            const Volumes<const Logit> from = volumes(logits);
            const Volumes<float> to = volumes(out);
            const nb::gil_scoped_release unlocked;
            const Index whole{depth_out, to.shape[1], to.shape[2]};
            const LogitPlan plan{operators(from.shape, whole, orders, torch), to_half};
            resample_planes(from, to, plan, first_plane, threads);
        },
        nb::arg("logits").noconvert(), nb::arg("out").noconvert(), nb::arg("depth_out"), nb::arg("first_plane"),
        nb::arg("orders"), nb::arg("torch"), nb::arg("to_half"), nb::arg("threads"));
}

void bind_last_inputs(nb::module_& module) {
    module.def(
        "last_inputs",
        [](std::int64_t size_in, std::int64_t size_out, int order, bool torch) {
            const AxisOperator op(size_in, size_out, order, torch ? Convention::torch : Convention::scipy);
            if (!op.is_local()) throw std::invalid_argument("every output of a spline needs every input");
            std::vector<std::int64_t> last(op.first(), op.first() + size_out);
            for (std::int64_t& input : last) input += op.taps() - 1;
            return last;
        },
        nb::arg("size_in"), nb::arg("size_out"), nb::arg("order"), nb::arg("torch"));
}

template <class Label>
void bind_head_by_head(nb::module_& module) {
    module.def(
        "label_head",
        [](const Array3<const float>& values, bool to_half, std::uint32_t head, const Array3<float>& best,
           const Array3<Label>& labels, int threads) {
            const Volume<const float> from = volume(values);
            const Volume<float> largest = volume(best);
            const Volume<Label> to = volume(labels);
            const nb::gil_scoped_release unlocked;
            label_head(from, to_half, head, largest, to, threads);
        },
        nb::arg("values").noconvert(), nb::arg("to_half"), nb::arg("head"), nb::arg("best").noconvert(),
        nb::arg("labels").noconvert(), nb::arg("threads"));
    module.def(
        "paint_head",
        [](const Array3<const float>& values, bool to_half, std::uint32_t label, const Array3<Label>& labels,
           int threads) {
            const Volume<const float> from = volume(values);
            const Volume<Label> to = volume(labels);
            const nb::gil_scoped_release unlocked;
            paint_head(from, to_half, label, to, threads);
        },
        nb::arg("values").noconvert(), nb::arg("to_half"), nb::arg("label"), nb::arg("labels").noconvert(),
        nb::arg("threads"));
}

void bind_probabilities(nb::module_& module) {
    const auto in_place = [&](const char* name, void (*function)(const Volumes<float>&, int)) {
        module.def(
            name,
            [function](const Array4<float>& logits, int threads) {
                const Volumes<float> values = volumes(logits);
                const nb::gil_scoped_release unlocked;
                function(values, threads);
            },
            nb::arg("logits").noconvert(), nb::arg("threads"));
    };
    in_place("softmax_heads", softmax_heads);
    in_place("sigmoid_heads", sigmoid_heads);
}

void bind_accumulate(nb::module_& module) {
    module.def(
        "add_weighted",
        [](const Array4<const float>& logits, const Array3<const float>& weights, const Array4<Half>& sums,
           bool is_first, int threads) {
            const Volumes<const float> from = volumes(logits);
            const Volume<const float> by = volume(weights);
            const Volumes<Half> to = volumes(sums);
            const nb::gil_scoped_release unlocked;
            add_weighted(from, by, to, is_first, threads);
        },
        nb::arg("logits").noconvert(), nb::arg("weights").noconvert(), nb::arg("sums").noconvert(), nb::arg("is_first"),
        nb::arg("threads"));
    module.def(
        "add_halves",
        [](const Array4<const Half>& values, const Array4<Half>& sums, int threads) {
            const Volumes<const Half> from = volumes(values);
            const Volumes<Half> to = volumes(sums);
            const nb::gil_scoped_release unlocked;
            add_halves(from, to, threads);
        },
        nb::arg("values").noconvert(), nb::arg("sums").noconvert(), nb::arg("threads"));
    module.def(
        "divide",
        [](const Array4<Half>& sums, const Array3<const Half>& total, int threads) {
            const Volumes<Half> to = volumes(sums);
            const Volume<const Half> by = volume(total);
            QuotientLimits limits{};
            {
                const nb::gil_scoped_release unlocked;
                limits = divide(to, by, threads);
            }
            return std::pair(std::pair(limits.sum_low, limits.sum_high),
                             std::pair(limits.quotient_low, limits.quotient_high));
        },
        nb::arg("sums").noconvert(), nb::arg("total").noconvert(), nb::arg("threads"));
    module.def(
        "round_to_half",
        [](const Array3<const float>& values, const Array3<float>& out, int threads) {
            const Volume<const float> from = volume(values);
            const Volume<float> to = volume(out);
            const nb::gil_scoped_release unlocked;
            round_to_half(from, to, threads);
        },
        nb::arg("values").noconvert(), nb::arg("out").noconvert(), nb::arg("threads"));
}

void bind_normalize(nb::module_& module) {
    module.def(
        "moments",
        [](const Array3<float>& channel, const std::optional<Array3<const bool>>& mask, int threads) {
            const Channel values = volume(channel);
            const std::optional<Mask> inside = mask_of(mask);
            Moments found{};
            {
                const nb::gil_scoped_release unlocked;
                found = moments(values, inside, threads);
            }
            return std::pair(found.mean, found.std);
        },
        nb::arg("channel").noconvert(), nb::arg("mask").noconvert().none(), nb::arg("threads"));
    module.def(
        "z_score",
        [](const Array3<float>& channel, const std::optional<Array3<const bool>>& mask, int threads) {
            const Channel values = volume(channel);
            const std::optional<Mask> inside = mask_of(mask);
            const nb::gil_scoped_release unlocked;
            z_score(values, inside, threads);
        },
        nb::arg("channel").noconvert(), nb::arg("mask").noconvert().none(), nb::arg("threads"));
    module.def(
        "clip_and_scale",
        [](const Array3<float>& channel, float low, float high, float mean, float std, int threads) {
            const Channel values = volume(channel);
            const nb::gil_scoped_release unlocked;
            clip_and_scale(values, low, high, mean, std, threads);
        },
        nb::arg("channel").noconvert(), nb::arg("low"), nb::arg("high"), nb::arg("mean"), nb::arg("std"),
        nb::arg("threads"));
    module.def(
        "rescale_to_01",
        [](const Array3<float>& channel, int threads) {
            const Channel values = volume(channel);
            const nb::gil_scoped_release unlocked;
            rescale_to_01(values, threads);
        },
        nb::arg("channel").noconvert(), nb::arg("threads"));
    module.def(
        "rgb_to_01",
        [](const Array3<float>& channel, int threads) {
            const Channel values = volume(channel);
            Range range{};
            {
                const nb::gil_scoped_release unlocked;
                range = rgb_to_01(values, threads);
            }
            return std::pair(range.low, range.high);
        },
        nb::arg("channel").noconvert(), nb::arg("threads"));
    module.def(
        "limits",
        [](const Array3<const float>& values, int threads) {
            const Volume<const float> from = volume(values);
            Range range{};
            {
                const nb::gil_scoped_release unlocked;
                range = range_of(from, threads);
            }
            return std::pair(range.low, range.high);
        },
        nb::arg("values").noconvert(), nb::arg("threads"));
    module.def("fits_half", fits_half, nb::arg("lowest"), nb::arg("highest"));
}

void bind_masks(nb::module_& module) {
    module.def(
        "nonzero_box",
        [](const Array4<const float>& channels, int threads) {
            const Volumes<const float> from = volumes(channels);
            Box box{};
            {
                const nb::gil_scoped_release unlocked;
                box = nonzero_box(from, threads);
            }
            return std::pair(box.start, box.stop);
        },
        nb::arg("channels").noconvert(), nb::arg("threads"));
    module.def(
        "nonzero_mask",
        [](const Array4<const float>& channels, const Array3<bool>& mask, int threads) {
            const Volumes<const float> from = volumes(channels);
            const Volume<std::uint8_t> to = bytes<std::uint8_t>(mask);
            const nb::gil_scoped_release unlocked;
            nonzero_mask(from, to, threads);
        },
        nb::arg("channels").noconvert(), nb::arg("mask").noconvert(), nb::arg("threads"));
    module.def(
        "label_components",
        [](const Array3<const bool>& mask, int connectivity, const Array3<std::int32_t>& labels, int threads) {
            const Volume<const std::uint8_t> from = bytes<const std::uint8_t>(mask);
            const Volume<std::int32_t> to = volume(labels);
            const nb::gil_scoped_release unlocked;
            return label_components(from, connectivity, to, threads);
        },
        nb::arg("mask").noconvert(), nb::arg("connectivity"), nb::arg("labels").noconvert(), nb::arg("threads"));
    module.def(
        "fill_holes",
        [](const Array3<bool>& mask, int threads) {
            const Volume<std::uint8_t> to = bytes<std::uint8_t>(mask);
            const nb::gil_scoped_release unlocked;
            fill_holes(to, threads);
        },
        nb::arg("mask").noconvert(), nb::arg("threads"));
}

void bind_resample_labels(nb::module_& module) {
    module.def(
        "resample_labels",
        [](const Array3<const std::int32_t>& labels, const Array3<std::int32_t>& out, const ResamplePlan& plan,
           int threads) {
            const Volume<const std::int32_t> from = volume(labels);
            const Volume<std::int32_t> to = volume(out);
            const nb::gil_scoped_release unlocked;
            resample_labels(from, to, plan, threads);
        },
        nb::arg("labels").noconvert(), nb::arg("out").noconvert(), nb::arg("plan"), nb::arg("threads"));
}

template <class Label>
void bind_tidy(nb::module_& module) {
    using Wanted = std::vector<std::int64_t>;
    module.def(
        "keep_largest",
        [](const Array3<Label>& labels, const Wanted& wanted, std::int64_t background, int threads) {
            const Volume<Label> map = volume(labels);
            const nb::gil_scoped_release unlocked;
            keep_largest(map, wanted, background, threads);
        },
        nb::arg("labels").noconvert(), nb::arg("wanted"), nb::arg("background"), nb::arg("threads"));
    module.def(
        "remove_small",
        [](const Array3<Label>& labels, std::int64_t min_voxels, int threads) {
            const Volume<Label> map = volume(labels);
            const nb::gil_scoped_release unlocked;
            remove_small(map, min_voxels, threads);
        },
        nb::arg("labels").noconvert(), nb::arg("min_voxels"), nb::arg("threads"));
    module.def(
        "fill_label_holes",
        [](const Array3<Label>& labels, const Wanted& wanted, int threads) {
            const Volume<Label> map = volume(labels);
            const nb::gil_scoped_release unlocked;
            fill_label_holes(map, wanted, threads);
        },
        nb::arg("labels").noconvert(), nb::arg("wanted"), nb::arg("threads"));
}

}  // namespace

NB_MODULE(_fastnnunet_core, module) {
    // Raised whenever a function here changes, so that Python files never meet a library built from other sources.
    module.attr("INTERFACE") = 8;
    bind_kl_classes(module);
    bind_sample(module);
    bind_resample<float, float>(module);
    bind_resample<float, double>(module);
    bind_resample<Half, float>(module);
    bind_decisions(module);
    bind_locate(module);
    bind_resample_planned<float>(module);
    bind_resample_planned<Half>(module);
    bind_label_logits<float, std::uint8_t>(module);
    bind_label_logits<float, std::uint16_t>(module);
    bind_label_logits<Half, std::uint8_t>(module);
    bind_label_logits<Half, std::uint16_t>(module);
    bind_resample_planes<float>(module);
    bind_resample_planes<Half>(module);
    bind_last_inputs(module);
    bind_head_by_head<std::uint8_t>(module);
    bind_head_by_head<std::uint16_t>(module);
    bind_probabilities(module);
    bind_accumulate(module);
    bind_normalize(module);
    bind_masks(module);
    bind_resample_labels(module);
    bind_tidy<std::uint8_t>(module);
    bind_tidy<std::uint16_t>(module);
}
