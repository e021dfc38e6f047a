// Locate, then look: the blocks of an image, the box that is seen in them, and the part that is predicted.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <utility>

#include "bindings_arrays.hpp"
#include "core/locate.hpp"

using namespace fastnnunet;

namespace {

using Corners = std::pair<Index, Index>;  // of a box: its first voxel, and the one behind its last

Corners corners(const Box& box) { return {box.start, box.stop}; }

Box box_of(const Corners& corners) { return {corners.first, corners.second}; }

}  // namespace

void bind_locate(nb::module_& module) {
    module.def(
        "block_means",
        [](const Array4<const float>& image, const Index& factor, const Array4<float>& means, int threads) {
            const Volumes<const float> from = volumes(image);
            const Volumes<float> to = volumes(means);
            const nb::gil_scoped_release unlocked;
            block_means(from, factor, to, threads);
        },
        nb::arg("image").noconvert(), nb::arg("factor"), nb::arg("means").noconvert(), nb::arg("threads"));
    module.def(
        "seen_box",
        [](const Array4<const Half>& logits, double threshold, const Index& factor,
           const Index& shape) -> std::optional<Corners> {
            const std::optional<Box> box = seen_box(volumes(logits), threshold, factor, shape);
            if (!box) return std::nullopt;
            return corners(*box);
        },
        nb::arg("logits").noconvert(), nb::arg("threshold"), nb::arg("factor"), nb::arg("shape"));
    module.def(
        "with_margin",
        [](const Corners& box, double margin_mm, const std::array<double, 3>& spacing_mm, const Index& shape) {
            return corners(with_margin(box_of(box), margin_mm, spacing_mm, shape));
        },
        nb::arg("box"), nb::arg("margin_mm"), nb::arg("spacing_mm"), nb::arg("shape"));
    module.def(
        "window_part",
        [](const Index& shape, const Sizes& patch, const Corners& box) {
            return window_part(shape, patch, box_of(box));
        },
        nb::arg("shape"), nb::arg("patch"), nb::arg("box"));
    nb::class_<ImagePart>(module, "ImagePart")
        .def("__init__",
             [](ImagePart* self, const Index& origin, const Index& size) { new (self) ImagePart{origin, size}; },
             nb::arg("origin"), nb::arg("size"))
        .def_prop_ro("origin", [](const ImagePart& part) { return nb::make_tuple(part.origin[0], part.origin[1],
                                                                                part.origin[2]); },
                     nb::sig("def origin(self) -> tuple[int, int, int]"))
        .def_prop_ro("size", [](const ImagePart& part) { return nb::make_tuple(part.size[0], part.size[1],
                                                                              part.size[2]); },
                     nb::sig("def size(self) -> tuple[int, int, int]"))
        .def_prop_ro("voxels", &ImagePart::voxels)
        .def("bounds", &ImagePart::bounds, nb::arg("of_part"), nb::arg("shape"))
        .def("shared",
             [](const ImagePart& part, const Corners& of_part,
                const Index& shape) -> std::optional<std::pair<Corners, Corners>> {
                 const auto found = part.shared(box_of(of_part), shape);
                 if (!found) return std::nullopt;
                 return std::pair(corners(found->in_image), corners(found->in_box));
             },
             nb::arg("of_part"), nb::arg("shape"));
}
