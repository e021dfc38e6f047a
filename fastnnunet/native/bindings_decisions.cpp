// What the core decides without looking at an image: window grid, padding, weights, what to resample how.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "core/axis_operator.hpp"
#include "core/gaussian.hpp"
#include "core/no_memory.hpp"
#include "core/resample_plan.hpp"
#include "core/tiles.hpp"
#include "core/window.hpp"

namespace nb = nanobind;
using namespace fastnnunet;

namespace {

template <class T>
nb::tuple tuple_of(const T& values) {
    nb::list items;
    for (const auto& value : values) items.append(value);
    return nb::tuple(items);
}

nb::tuple tuple_of(const ChunkedWindow::PerAxis& axes) {
    return nb::make_tuple(tuple_of(axes[0]), tuple_of(axes[1]), tuple_of(axes[2]));
}

nb::tuple slices_of(const Box& box) {
    const auto along = [&](int axis) {
        return nb::slice(nb::int_(box.start[axis]), nb::int_(box.stop[axis]), nb::none());
    };
    return nb::make_tuple(along(0), along(1), along(2));
}

nb::tuple tiles_of(const ChunkedWindow& window) {
    nb::list tiles;
    for (std::int64_t i = 0; i < window.tiles(); ++i) tiles.append(tuple_of(window.tile_start(i)));
    return nb::tuple(tiles);
}

nb::ndarray<nb::numpy, std::int32_t, nb::ndim<3>> tiles_per_chunk(const ChunkedWindow& window) {
    using Counts = std::vector<std::int32_t>;
    const Index grid = window.grid();
    const auto size = [&](int axis) { return static_cast<std::size_t>(grid[axis]); };
    auto counts = std::make_unique<Counts>(window.tiles_per_chunk());
    std::int32_t* data = counts->data();
    const nb::capsule owner(counts.release(), [](void* held) noexcept { delete static_cast<Counts*>(held); });
    return {data, {size(0), size(1), size(2)}, owner};
}

void bind_window(nb::module_& module) {
    module.def(
        "centre_padding",
        [](std::int64_t size, std::int64_t least) {
            const Padding padding = centre_padding(size, least);
            return std::pair(padding.below, padding.above);
        },
        nb::arg("size"), nb::arg("least"));
    module.def("tile_starts", tile_starts, nb::arg("image"), nb::arg("tile"), nb::arg("step_size"));
    module.def(
        "gaussian_weights",
        [](const nb::ndarray<float, nb::c_contig, nb::device::cpu>& out) {
            Sizes tile;
            for (std::size_t axis = 0; axis < out.ndim(); ++axis) tile.push_back(out.shape(axis));
            const std::vector<float> weights = gaussian_weights(tile);
            std::copy(weights.begin(), weights.end(), out.data());
        },
        nb::arg("out").noconvert());

    using Window = ChunkedWindow;
    nb::class_<Window>(module, "ChunkedWindow")
        .def_static("of_chunks", &Window::of_chunks, nb::arg("shape"), nb::arg("patch"), nb::arg("step_size"),
                    nb::arg("chunk"))
        .def_static("streamed", &Window::streamed, nb::arg("shape"), nb::arg("patch"), nb::arg("step_size"))
        .def_prop_ro("shape", [](const Window& window) { return tuple_of(window.shape()); },
                     nb::sig("def shape(self) -> tuple[int, int, int]"))
        .def_prop_ro("tile", [](const Window& window) { return tuple_of(window.tile()); },
                     nb::sig("def tile(self) -> tuple[int, int, int]"))
        .def_prop_ro("starts", [](const Window& window) { return tuple_of(window.starts()); },
                     nb::sig("def starts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]"))
        .def_prop_ro("bounds", [](const Window& window) { return tuple_of(window.bounds()); },
                     nb::sig("def bounds(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]"))
        .def_prop_ro("grid", [](const Window& window) { return tuple_of(window.grid()); },
                     nb::sig("def grid(self) -> tuple[int, int, int]"))
        .def_prop_ro("tiles", tiles_of, nb::sig("def tiles(self) -> tuple[tuple[int, int, int], ...]"))
        .def("chunk_slices", [](const Window& window, const Index& number) { return slices_of(window.chunk(number)); },
             nb::arg("number"),
             nb::sig("def chunk_slices(self, number: collections.abc.Sequence[int]) -> tuple[slice, slice, slice]"))
        .def("overlap",
             [](const Window& window, std::int64_t tile, const Index& number) {
                 const Window::Overlap shared = window.overlap(tile, number);
                 return nb::make_tuple(slices_of(shared.in_chunk), slices_of(shared.in_tile));
             },
             nb::arg("tile_number"), nb::arg("number"),
             nb::sig("def overlap(self, tile_number: int, number: collections.abc.Sequence[int]) -> "
                     "tuple[tuple[slice, slice, slice], tuple[slice, slice, slice]]"))
        .def("chunks_of",
             [](const Window& window, std::int64_t tile) {
                 nb::list numbers;
                 for (const Index& number : window.chunks_of(tile)) numbers.append(tuple_of(number));
                 return numbers;
             },
             nb::arg("tile_number"),
             nb::sig("def chunks_of(self, tile_number: int) -> list[tuple[int, int, int]]"))
        .def_prop_ro("tiles_per_chunk", tiles_per_chunk, nb::rv_policy::move)  // of its own, not a part of the window
        .def("peak_voxels", &Window::peak_voxels, nb::arg("margin") = 0);
}

// The tables of an axis operator, for whoever applies it elsewhere
void bind_axis_operator(nb::module_& module) {
    using Operator = AxisOperator;
    const auto table = [](const auto* values, std::int64_t count) {
        return std::vector(values, values + count);
    };
    nb::class_<Operator>(module, "AxisOperator")
        .def("__init__",
             [](Operator* self, std::int64_t size_in, std::int64_t size_out, int order, bool torch) {
                 new (self) Operator(size_in, size_out, order, torch ? Convention::torch : Convention::scipy);
             },
             nb::arg("size_in"), nb::arg("size_out"), nb::arg("order"), nb::arg("torch"))
        .def_prop_ro("taps", &Operator::taps)
        .def_prop_ro("is_identity", &Operator::is_identity)
        .def_prop_ro("is_selection", &Operator::is_selection)
        .def_prop_ro("poles", &Operator::poles)
        .def_prop_ro("first", [=](const Operator& op) { return table(op.first(), op.size_out()); })
        .def_prop_ro("weights", [=](const Operator& op) { return table(op.weights(), op.size_out() * op.taps()); })
        .def_prop_ro("sample", [](const Operator& op) {
            std::vector<std::int32_t> samples;
            for (std::int64_t i = 0; i < op.size_out(); ++i) samples.push_back(op.sample(i));
            return samples;
        });
}

void bind_resample_plan(nb::module_& module) {
    using Plan = ResamplePlan;
    nb::class_<Plan>(module, "ResamplePlan")
        .def_prop_ro("orders", [](const Plan& plan) { return tuple_of(plan.orders); },
                     nb::sig("def orders(self) -> tuple[int, int, int]"))
        .def_prop_ro("shape_out", [](const Plan& plan) { return tuple_of(plan.shape_out); },
                     nb::sig("def shape_out(self) -> tuple[int, int, int]"))
        .def_ro("separate_axis", &Plan::separate_axis)
        .def_prop_ro("clip",
                     [](const Plan& plan) {
                         return plan.clip == Clip::none ? "none" : plan.clip == Clip::whole ? "whole" : "per_plane";
                     })
        .def_prop_ro("is_local", &Plan::is_local)
        .def_prop_ro("is_torch", [](const Plan& plan) { return plan.convention == Convention::torch; })
        .def_prop_ro("keeps_dtype", &Plan::keeps_type);
    module.def(
        "resampled_shape",
        [](const Index& shape, const Spacing& spacing, const Spacing& target) {
            return tuple_of(resampled_shape(shape, spacing, target));
        },
        nb::arg("shape"), nb::arg("spacing"), nb::arg("target"),
        nb::sig("def resampled_shape(shape: collections.abc.Sequence[int], spacing: collections.abc.Sequence[float], "
                "target: collections.abc.Sequence[float]) -> tuple[int, int, int]"));
    module.def(
        "plan_resampling",
        [](bool torch, int order, int order_z, std::optional<bool> force_separate_z, double anisotropy_threshold,
           const Index& shape, const Index& shape_out, const Spacing& spacing, const Spacing& spacing_out) {
            const ResampleSpec spec{torch ? Convention::torch : Convention::scipy, order, order_z, force_separate_z,
                                    anisotropy_threshold};
            return plan_resampling(spec, shape, shape_out, spacing, spacing_out);
        },
        nb::arg("torch"), nb::arg("order"), nb::arg("order_z"), nb::arg("force_separate_z").none(),
        nb::arg("anisotropy_threshold"), nb::arg("shape"), nb::arg("shape_out"), nb::arg("spacing"),
        nb::arg("spacing_out"));
}

void bind_tiles(nb::module_& module) {
    nb::class_<Cut>(module, "Cut")
        .def_ro("length", &Cut::length)
        .def_ro("tile", &Cut::tile)
        .def_prop_ro("starts", [](const Cut& cut) { return tuple_of(cut.starts); },
                     nb::sig("def starts(self) -> tuple[int, ...]"))
        .def_prop_ro("kept", [](const Cut& cut) { return tuple_of(cut.kept); },
                     nb::sig("def kept(self) -> tuple[int, ...]"))
        .def_prop_ro("before", [](const Cut& cut) { return tuple_of(cut.before); },
                     nb::sig("def before(self) -> tuple[int, ...]"))
        .def_prop_ro("computed", &Cut::computed);
    nb::class_<TileAxis>(module, "TileAxis")
        .def("__init__",
             [](TileAxis* self, std::int64_t size, std::int64_t least, std::int64_t multiple, std::int64_t halo,
                std::int64_t shifts, std::optional<std::int64_t> most) {
                 new (self) TileAxis{size, least, multiple, halo, shifts, most};
             },
             nb::kw_only(), nb::arg("size"), nb::arg("least"), nb::arg("multiple"), nb::arg("halo"),
             nb::arg("shifts") = 1, nb::arg("most") = nb::none())
        .def_ro("halo", &TileAxis::halo)
        .def_ro("least", &TileAxis::least)
        .def_prop_ro("frame", &TileAxis::frame)
        .def_prop_ro("before", [](const TileAxis& axis) { return tuple_of(axis.before()); },
                     nb::sig("def before(self) -> tuple[int, ...]"))
        .def("crop", &TileAxis::crop, nb::arg("begin"), nb::arg("end"))
        .def("cuts", &TileAxis::cuts);
    nb::class_<Tiling>(module, "Tiling")
        .def_prop_ro("cuts", [](const Tiling& tiling) { return tuple_of(tiling.cuts); },
                     nb::sig("def cuts(self) -> tuple[Cut, Cut, Cut]"))
        .def_prop_ro("tile", [](const Tiling& tiling) { return tuple_of(tiling.tile()); },
                     nb::sig("def tile(self) -> tuple[int, int, int]"))
        .def_prop_ro("grid", [](const Tiling& tiling) { return tuple_of(tiling.grid()); },
                     nb::sig("def grid(self) -> tuple[int, int, int]"))
        .def_prop_ro("shifts", &Tiling::shifts)
        .def("kept", [](const Tiling& tiling, const Index& number) { return slices_of(tiling.kept(number)); },
             nb::arg("number"),
             nb::sig("def kept(self, number: collections.abc.Sequence[int]) -> tuple[slice, slice, slice]"))
        .def("origin",
             [](const Tiling& tiling, const Index& number, std::int64_t shift) {
                 return tuple_of(tiling.origin(number, shift));
             },
             nb::arg("number"), nb::arg("shift"),
             nb::sig("def origin(self, number: collections.abc.Sequence[int], shift: int) -> tuple[int, int, int]"));
    // a cost is given the lengths of a tile as a list
    module.def("fewest_tiles", fewest_tiles, nb::arg("axes"), nb::arg("cost"), nb::arg("limit"));
    module.def("tells_no_memory", tells_no_memory, nb::arg("message"));
    module.def("smaller_limit", smaller_limit, nb::arg("axes"), nb::arg("cost"), nb::arg("limit"));
    module.def("least_cost", least_cost, nb::arg("axes"), nb::arg("cost"));
}

}  // namespace

void bind_decisions(nb::module_& module) {
    bind_tiles(module);
    bind_axis_operator(module);
    bind_resample_plan(module);
    bind_window(module);
}
