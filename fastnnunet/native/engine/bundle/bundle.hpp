// The bundle: the folder a model is deployed as. What fastnnunet/specs/bundle.py describes and checks.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bundle/json.hpp"
#include "core/resample_plan.hpp"
#include "core/view.hpp"
#include "core/window.hpp"

namespace fastnnunet::engine {

// How tiles of a network may be cut whose output depends on its surroundings alone; axes as the patch size.
struct OnePass {
    Sizes halo, multiples;
    std::string halo_is;
    std::int64_t bytes_per_voxel;
};

// A tiny network of two heads that sees blocks of the preprocessed image, and what becomes of its answer.
struct Locator {
    std::string model_file;
    Index factor;      // voxels of a block
    Sizes patch_size;  // of its network, in blocks
    std::optional<OnePass> one_pass;
    double threshold;  // of the probability of the foreground
    double margin_mm;  // around the blocks above it
};

// Axis order is nnU-Net's internal one (after transpose_forward).
struct Bundle {
    std::string folder;
    std::string name, configuration;
    std::vector<std::string> channel_names;
    Json labels;
    std::optional<std::vector<std::int64_t>> regions_class_order;
    std::int64_t num_heads = 0;
    std::vector<std::int64_t> previous_labels;
    std::string file_ending, reader_writer;
    std::array<int, 3> transpose_forward{}, transpose_backward{};
    std::vector<double> spacing_mm;  // target; two entries for 2d
    Sizes patch_size;                // zyx, two entries for 2d
    std::vector<std::string> normalization_schemes;
    std::vector<bool> use_mask_for_norm;
    Json intensity_properties;
    Json resampling;
    double step_size = 0.5;
    std::vector<int> mirror_axes;
    std::int64_t batch_size = 0;  // 0: any
    std::optional<OnePass> one_pass;
    std::optional<Locator> locator;  // finds the box in which alone is predicted; none: everywhere
    Json plans, dataset_json;
    std::vector<std::string> model_files;
    std::vector<std::string> folds;
    Json provenance;
    std::map<std::string, std::string> files;  // name -> SHA-256

    std::int64_t channels() const { return static_cast<std::int64_t>(channel_names.size() + previous_labels.size()); }
    bool is_2d() const { return patch_size.size() == 2; }
};

// Reads and checks a bundle folder. Throws NotFoundError, CorruptError, NewerFormatError, with the words of
// `load_bundle_spec`.
Bundle load_bundle(const std::string& folder);

// The locator as a bundle of its own in the same folder. Only where there is one.
Bundle of_locator(const Bundle& bundle);

// The quantised twin of a model file: `model.onnx` -> `model_int8.onnx`
std::string int8_file(const std::string& model_file, const std::string& ending);

}  // namespace fastnnunet::engine
