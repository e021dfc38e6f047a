#include "predict/preprocess.hpp"

#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

#include "bundle/file.hpp"
#include "core/components.hpp"
#include "core/label_maps.hpp"
#include "core/nonzero.hpp"
#include "core/threads.hpp"
#include "error.hpp"

namespace fastnnunet::engine {
namespace {

constexpr std::int64_t kMostGrowth = 4096, kFewVoxels = std::int64_t{1} << 24;
constexpr const char* kSchemes =
    "ZScoreNormalization, CTNormalization, RescaleTo01Normalization, RGBTo01Normalization, NoNormalization";

// "%g" as Python's format
std::string short_text(double value) {
    char text[64];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
}

template <class T>
std::array<T, 3> transposed(const std::array<T, 3>& of, const std::array<int, 3>& axes) {
    return {of[axes[0]], of[axes[1]], of[axes[2]]};
}

// The internal axes of a view in the axes of the image: `steps[axis]` is how far neighbours along it are apart.
template <class T>
struct Strided {
    T* data;
    Index shape;
    std::array<std::int64_t, 3> steps;
};

template <class T>
Strided<T> transposed(const Volume<T>& image, const std::array<int, 3>& axes) {
    const std::array<std::int64_t, 3> steps{image.stride[0], image.stride[1], 1};
    return {image.data, transposed(image.shape, axes), transposed(steps, axes)};
}

template <class T, class U>
void copy(const Strided<T>& from, const Volume<U>& to, int threads) {
    parallel_for(to.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < to.shape[1]; ++y) {
            const T* start = from.data + z * from.steps[0] + y * from.steps[1];
            U* row = to.row(z, y);
            if (from.steps[2] == 1) {
                std::copy(start, start + to.shape[2], row);
            } else {
                for (std::int64_t x = 0; x < to.shape[2]; ++x) row[x] = start[x * from.steps[2]];
            }
        }
    });
}

// Non-zero voxels of the crop and the holes they enclose. Equal to the filled mask of the whole image: everything
// outside the box is connected to the border, so a zero region that touches the box is no hole.
Array3<std::uint8_t> filled_mask(const Volumes<const float>& channels, int threads) {
    Array3<std::uint8_t> mask(channels.shape);
    nonzero_mask(channels, mask.view(), pass_threads(threads, channels.count * mask.size()));
    fill_holes(mask.view(), pass_threads(threads, mask.size()));
    return mask;
}

float statistic(const Json& intensity, const char* name) { return static_cast<float>(intensity.find(name)->real()); }

void normalize(const Volume<float>& channel, const std::string& scheme, const std::optional<Mask>& mask,
               const Json* intensity, int threads) {
    threads = pass_threads(threads, channel.size());
    if (scheme == "ZScoreNormalization") {
        z_score(channel, mask, threads);
    } else if (scheme == "CTNormalization") {
        clip_and_scale(channel, statistic(*intensity, "percentile_00_5"), statistic(*intensity, "percentile_99_5"),
                       statistic(*intensity, "mean"), statistic(*intensity, "std"), threads);
    } else if (scheme == "RescaleTo01Normalization") {
        rescale_to_01(channel, threads);
    } else if (scheme == "RGBTo01Normalization") {
        check_colours(rgb_to_01(channel, threads));
    }
}

// Throws BadImage when a spacing that is damaged or in another unit would make far too large an image.
void check_growth(const Index& shape, const Index& shape_out, const Spacing& spacing, const Spacing& target,
                  std::int64_t voxel_bytes) {
    const auto product = [](const Index& of) {
        return static_cast<double>(of[0]) * static_cast<double>(of[1]) * static_cast<double>(of[2]);
    };
    const double voxels = product(shape_out);
    const bool too_many = voxels > std::max<double>(kFewVoxels, kMostGrowth * product(shape));
    if (too_many || voxels * static_cast<double>(voxel_bytes) > static_cast<double>(memory_bytes())) {
        throw BadImage("the resampled image would not fit: " + tuple_text(shape) + " voxels of " + tuple_text(spacing) +
                       " mm are " + tuple_text(shape_out) + " voxels of the model's " + tuple_text(target) +
                       " mm\nexpected a spacing in millimetres; check that of the image");
    }
}

// What was predicted outside the non-zero region counts as inside, as in nnU-Net's crop_to_nonzero; -1 elsewhere.
Array3<std::int32_t> crop_previous(const ImageArray& image, const Box& crop_image, const Volumes<const float>& channels,
                                   const Bundle& bundle, int threads) {
    const Volume<const std::int32_t> whole{
        image.previous,
        image.previous_shape,
        {image.previous_shape[1] * image.previous_shape[2], image.previous_shape[2]}};
    const Array3<std::uint8_t> inside = filled_mask(channels, threads);
    const Volume<const std::int32_t> labels = part(whole, crop_image);
    Array3<std::int32_t> in_image(labels.shape);
    for (std::int64_t row = 0; row < labels.rows(); ++row) {
        const std::int32_t* from = labels.row(row);
        const std::uint8_t* is_inside = inside.view().row(row);
        std::int32_t* to = in_image.view().row(row);
        for (std::int64_t x = 0; x < labels.shape[2]; ++x) to[x] = from[x] == 0 && !is_inside[x] ? -1 : from[x];
    }
    Array3<std::int32_t> out(transposed(labels.shape, bundle.transpose_forward));
    copy(transposed(in_image.view(), bundle.transpose_forward), out.view(), threads);
    return out;
}

void normalize_channels(const Volumes<float>& channels, const Volumes<const float>& read, const Bundle& bundle,
                        const Array3<std::int32_t>* previous, int threads) {
    std::optional<Array3<std::uint8_t>> mask;
    bool is_masked = false;
    for (const bool use : bundle.use_mask_for_norm) is_masked = is_masked || use;
    if (is_masked && previous == nullptr) mask = filled_mask(read, threads);
    if (is_masked && previous != nullptr) {  // in the axes of the image
        mask.emplace(channels.shape);
        Array3<std::uint8_t> internal(previous->shape);
        for (std::int64_t i = 0; i < previous->size(); ++i) internal.values[i] = previous->values[i] >= 0;
        copy(transposed(internal.view(), bundle.transpose_backward), mask->view(), threads);
    }
    for (std::int64_t channel = 0; channel < channels.count; ++channel) {
        std::optional<Mask> inside;
        if (bundle.use_mask_for_norm[channel]) inside = mask->read();
        normalize(channels[channel], bundle.normalization_schemes[channel], inside,
                  bundle.intensity_properties.find(std::to_string(channel)), threads);
    }
}

}  // namespace

std::optional<ResamplePlan> plan(const Resampling& resampling, const Index& shape, const Index& shape_out,
                                 const Spacing& spacing, const Spacing& spacing_out) {
    if (!resampling) return std::nullopt;
    return plan_resampling(*resampling, shape, shape_out, spacing, spacing_out);
}

std::string tuple_text(const Index& values) {
    return "(" + std::to_string(values[0]) + ", " + std::to_string(values[1]) + ", " + std::to_string(values[2]) + ")";
}

std::string tuple_text(const Spacing& values) {
    return "(" + python_real(values[0]) + ", " + python_real(values[1]) + ", " + python_real(values[2]) + ")";
}

void check_image(const ImageArray& image, const Bundle& bundle) {
    const auto expected = static_cast<std::int64_t>(bundle.channel_names.size());
    if (image.voxels.count != expected) {
        std::string names;
        for (const std::string& name : bundle.channel_names) names += (names.empty() ? "" : ", ") + name;
        throw BadImage("the image has " + std::to_string(image.voxels.count) +
                       " channel(s) and 3 spatial axes; the model "
                       "needs " +
                       std::to_string(expected) + " channel(s) (" + names + ") and 3 axes");
    }
    if (image.voxels.size() == 0) {
        throw BadImage("the image is empty: shape (" + std::to_string(image.voxels.count) + ", " +
                       tuple_text(image.voxels.shape).substr(1));
    }
    const bool is_stage = !bundle.previous_labels.empty();
    if ((image.previous != nullptr) != is_stage) {
        throw BadImage(std::string("the model ") +
                       (is_stage ? "needs the previous stage's segmentation" : "is no cascade stage") +
                       "; give one with -prev_stage_predictions for a cascade stage and none else");
    }
    if (is_stage && image.previous_shape != image.voxels.shape) {
        throw BadImage("the previous segmentation has shape " + tuple_text(image.previous_shape) +
                       ", expected the image's " + tuple_text(image.voxels.shape));
    }
}

void check_colours(const Range& range) {
    if (range.low >= 0 && range.high <= 255) return;
    throw BadImage("the model expects colour values from 0 to 255, got " + short_text(range.low) + " to " +
                   short_text(range.high));
}

Planned plan_case(const ImageArray& image, const Box& crop, const Preprocessing& how) {
    const Bundle& bundle = how.bundle;
    const std::array<int, 3>& forward = bundle.transpose_forward;
    Case made;
    made.image_shape = image.voxels.shape;
    made.spacing = transposed(image.spacing, forward);
    made.shape_before_cropping = transposed(image.voxels.shape, forward);
    made.crop = {transposed(crop.start, forward), transposed(crop.stop, forward)};
    const Index cropped = made.cropped_shape();
    // a 2d configuration leaves the distance between slices alone
    made.target = made.spacing;
    const std::size_t dims = bundle.spacing_mm.size();
    std::copy(bundle.spacing_mm.begin(), bundle.spacing_mm.end(), made.target.begin() + static_cast<long>(3 - dims));
    const Index shape = resampled_shape(cropped, made.spacing, made.target);
    if (shape[0] == 0 || shape[1] == 0 || shape[2] == 0) {
        throw BadImage("nothing of the image would be left: " + tuple_text(cropped) + " voxels of " +
                       tuple_text(made.spacing) + " mm are " + tuple_text(shape) + " voxels of the model's " +
                       tuple_text(made.target) +
                       " mm\nexpected an image at least half such a voxel wide; check its spacing");
    }
    const std::optional<ResamplePlan> data_plan = plan(how.data, cropped, shape, made.spacing, made.target);
    if (data_plan) check_growth(cropped, shape, made.spacing, made.target, 4 * bundle.channels());
    return {std::move(made), data_plan, data_plan ? shape : cropped};
}

Case preprocess(ImageArray image, const Preprocessing& how) {
    const Bundle& bundle = how.bundle;
    const int threads = how.threads;
    const std::array<int, 3>& forward = bundle.transpose_forward;
    check_image(image, bundle);
    const Box crop_image = nonzero_box(image.voxels.read(), pass_threads(threads, image.voxels.size()));
    const Volumes<float> channels = part(image.voxels.view(), crop_image);
    std::optional<Array3<std::int32_t>> previous;
    if (image.previous != nullptr) previous = crop_previous(image, crop_image, readable(channels), bundle, threads);
    normalize_channels(channels, readable(channels), bundle, previous ? &*previous : nullptr, threads);

    auto [made, data_plan, shape_out] = plan_case(image, crop_image, how);
    const Index cropped = made.cropped_shape();
    // threads that wait for each other keep cores from the model that is being loaded meanwhile
    const int few = pass_threads(threads, std::max(voxels_of(cropped), voxels_of(shape_out)), 8);
    const bool is_as_read = forward == std::array<int, 3>{0, 1, 2} && cropped == image.voxels.shape;
    if (!data_plan && is_as_read && !previous) {
        made.data = std::move(image.voxels);
        return made;
    }
    made.data = Array4<float>(bundle.channels(), shape_out);
    for (std::int64_t channel = 0; channel < channels.count; ++channel) {
        const Volume<float> out = made.data.view()[channel];
        const Strided<float> from = transposed(channels[channel], forward);
        if (!data_plan) {
            copy(from, out, few);
        } else if (from.steps[2] == 1) {
            const Volume<const float> in{from.data, from.shape, {from.steps[0], from.steps[1]}};
            resample(in, out, *data_plan, few);
        } else {
            Array3<float> in(cropped);
            copy(from, in.view(), few);
            resample(in.read(), out, *data_plan, few);
        }
    }
    if (previous) {
        const std::optional<ResamplePlan> label_plan = plan(how.labels, cropped, shape_out, made.spacing, made.target);
        Array3<std::int32_t> resampled;
        if (label_plan) {
            resampled = Array3<std::int32_t>(shape_out);
            resample_labels(previous->read(), resampled.view(), *label_plan, few);
        } else {
            resampled = std::move(*previous);
        }
        for (std::size_t i = 0; i < bundle.previous_labels.size(); ++i) {
            float* out = made.data.view()[channels.count + static_cast<std::int64_t>(i)].data;
            for (std::int64_t voxel = 0; voxel < resampled.size(); ++voxel) {
                out[voxel] = resampled.values[voxel] == bundle.previous_labels[i] ? 1.0f : 0.0f;
            }
        }
    }
    return made;
}

Resampling parse_resampling(const Json& entry, const std::string& what) {
    const Json* function = entry.find("fn");
    const std::string name = function == nullptr ? "None" : function->text();
    const Json none(Json::Kind::object, "");
    const Json* given = entry.find("kwargs");
    const Json& kwargs = given == nullptr || given->is_null() ? none : *given;
    const std::string about = "resampling of " + what + ": ";
    std::vector<std::string> known;
    if (name == "resample_data_or_seg_to_shape") {
        known = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"};
    } else if (name == "resample_torch_fornnunet") {
        known = {"is_seg",      "force_separate_z", "separate_z_anisotropy_threshold", "mode", "aniso_axis_mode",
                 "num_threads", "device",           "memefficient_seg_resampling"};
    } else if (name != "no_resampling_hack") {
        throw SpecError(
            about + "the plans name " + (function == nullptr ? "None" : function->python()) +
            ", which this runtime cannot reproduce; known: resample_data_or_seg_to_shape, "
            "resample_torch_fornnunet, no_resampling_hack\npredict with nnU-Net itself, or re-plan with one of "
            "these functions");
    }
    std::vector<std::string> unknown;
    for (const auto& member : kwargs.members()) {
        if (std::find(known.begin(), known.end(), member.first) == known.end()) unknown.push_back(member.first);
    }
    std::sort(unknown.begin(), unknown.end());
    if (!unknown.empty()) {
        std::string names;
        for (const std::string& one : unknown) names += (names.empty() ? "" : ", ") + one;
        throw SpecError(about + name + " has unknown arguments " + names);
    }
    if (const Json* is_seg = kwargs.find("is_seg"); is_seg != nullptr && is_seg->truth()) {
        throw SpecError(about + name + " has is_seg=True, expected False for an image or logits");
    }
    if (name == "no_resampling_hack") return std::nullopt;
    ResampleSpec spec;
    if (const Json* threshold = kwargs.find("separate_z_anisotropy_threshold"))
        spec.anisotropy_threshold = threshold->real();
    const Json* force = kwargs.find("force_separate_z");
    if (force != nullptr && !force->is_null()) spec.force_separate_z = force->truth();
    if (name == "resample_torch_fornnunet") {
        const Json *mode = kwargs.find("mode"), *across = kwargs.find("aniso_axis_mode");
        const std::string modes = "(" + (mode == nullptr ? "'linear'" : mode->python()) + ", " +
                                  (across == nullptr ? "'nearest-exact'" : across->python()) + ")";
        if (modes != "('linear', 'nearest-exact')") {
            throw SpecError(about + name + " has mode and aniso_axis_mode " + modes +
                            ", this runtime reproduces only ('linear', 'nearest-exact')");
        }
        spec.convention = Convention::torch;
        spec.order = 1;
        return spec;
    }
    if (force == nullptr) spec.force_separate_z = false;
    if (const Json* order = kwargs.find("order")) spec.order = static_cast<int>(*order->integer());
    if (const Json* order_z = kwargs.find("order_z")) spec.order_z = static_cast<int>(*order_z->integer());
    return spec;
}

Resampling parse_label_resampling(const Json& entry, const std::string& what) {
    Json changed = entry;
    for (auto& [key, value] : changed.members()) {
        if (key == "kwargs") value.erase("is_seg");
    }
    const Resampling spec = parse_resampling(changed, what);
    if (spec && (spec->convention == Convention::torch || spec->order_z != 0)) {
        throw SpecError("resampling of " + what + ": label maps by " + entry.find("fn")->text() + " with order_z " +
                        std::to_string(spec->order_z) +
                        " are nothing that this runtime reproduces\npredict with nnU-Net itself");
    }
    return spec;
}

void check_normalization(const Bundle& bundle) {
    std::string problems;
    const auto add = [&](const std::string& problem) { problems += (problems.empty() ? "" : "\n") + problem; };
    for (std::size_t index = 0; index < bundle.normalization_schemes.size(); ++index) {
        const std::string& scheme = bundle.normalization_schemes[index];
        const std::string channel = std::to_string(index);
        if (std::string(", ").append(kSchemes).append(", ").find(", " + scheme + ", ") == std::string::npos) {
            add("normalisation " + python_text(scheme) + " of channel " + channel + " is unknown; known: " + kSchemes);
        }
        if (scheme != "CTNormalization") continue;
        const Json* statistics = bundle.intensity_properties.find(channel);
        std::string missing;
        for (const char* name : {"mean", "percentile_00_5", "percentile_99_5", "std"}) {
            if (statistics != nullptr && statistics->find(name) != nullptr) continue;
            missing += (missing.empty() ? "" : ", ") + std::string(name);
        }
        if (!missing.empty()) {
            add("CTNormalization of channel " + channel + " needs the training statistics " + missing);
        }
    }
    if (!problems.empty()) throw SpecError(problems);
}

}  // namespace fastnnunet::engine
