// From an image as read to what the network sees: transpose, crop to non-zero, normalise, resample.
// As fastnnunet/runtime/preprocess.py. Axes: C channel, Z Y X nnU-Net's internal order unless the name says `image`.
#pragma once

#include <optional>

#include "bundle/bundle.hpp"
#include "core/normalize.hpp"
#include "core/resample_plan.hpp"
#include "predict/arrays.hpp"

namespace fastnnunet::engine {

// One of nnU-Net's resampling functions; none: nothing is resampled.
using Resampling = std::optional<ResampleSpec>;

// Reads `{"fn": name, "kwargs": {...}}` of a bundle. Throws SpecError naming what this runtime cannot reproduce.
Resampling parse_resampling(const Json& entry, const std::string& what);
Resampling parse_label_resampling(const Json& entry, const std::string& what);

// Throws SpecError for a scheme this runtime does not have, or CT without its intensity statistics.
void check_normalization(const Bundle& bundle);

class Stream;

// What the network sees, and what is needed to put its answer back into the image.
struct Case {
    Array4<float> data;
    std::shared_ptr<const Stream> stream;  // of the case, where `data` lies on a GPU; see device/stages.hpp
    Spacing spacing, target;
    Index shape_before_cropping;
    Box crop;
    Index image_shape;  // in the axes of the image

    Index cropped_shape() const { return extent(crop); }
};

// An image as the reader returns it, which is overwritten; `previous`: of a cascade stage, labels (z, y, x) or null.
struct ImageArray {
    Array4<float> voxels;
    Spacing spacing;
    const std::int32_t* previous = nullptr;
    Index previous_shape{};
};

struct Preprocessing {
    const Bundle& bundle;
    Resampling data, labels;
    int threads;
};

// Throws BadImage when the number of channels is not the model's, or the previous segmentation does not fit.
Case preprocess(ImageArray image, const Preprocessing& how);

// Its steps, for whoever takes them elsewhere.
void check_image(const ImageArray& image, const Bundle& bundle);
// Throws BadImage for colours outside 0 to 255.
void check_colours(const Range& range);

// All that becomes of an image but its data, which are to have that shape.
struct Planned {
    Case without_data;
    std::optional<ResamplePlan> plan;  // none: the crop as it is
    Index shape;
};
// `crop`: in the axes of the image. Throws BadImage where nothing or far too much would be left of it.
Planned plan_case(const ImageArray& image, const Box& crop, const Preprocessing& how);

// How to take `shape` to `shape_out`; none where nnU-Net leaves the array alone.
std::optional<ResamplePlan> plan(const Resampling& resampling, const Index& shape, const Index& shape_out,
                                 const Spacing& spacing, const Spacing& spacing_out);

// Python's str of a tuple of numbers
std::string tuple_text(const Index& values);
std::string tuple_text(const Spacing& values);

}  // namespace fastnnunet::engine
