// Tidying of a label map: largest components, small pieces, holes. As fastnnunet/images/tidy.
#pragma once

#include <string>
#include <vector>

#include "bundle/json.hpp"
#include "predict/preprocess.hpp"

namespace fastnnunet::engine {

// A label of dataset.json, or a region of several.
struct NamedLabels {
    std::string name;
    std::vector<std::int64_t> labels;
};

// All but the background and the ignore label, in their order.
std::vector<NamedLabels> named_labels(const Json& labels);

// What to do to a label map, in this order.
struct Cleanup {
    struct KeepLargest {
        std::vector<std::int64_t> labels;
        std::int64_t background = 0;
    };

    std::vector<KeepLargest> keep_largest;
    double min_size = 0;  // smaller components of each label go
    bool is_mm3 = false;  // else voxels
    std::vector<std::int64_t> fill_holes;

    bool is_nothing() const { return keep_largest.empty() && min_size <= 0 && fill_holes.empty(); }
};

// What options ask for. `labels` as in dataset.json; words: `all`, `each`, a name or number, several joined with `+`.
// `postprocessing`: nnU-Net's postprocessing.json, or empty. Throws SpecError, NotFoundError, CorruptError.
Cleanup parse_cleanup(const Json& labels, const std::vector<std::string>& keep_largest, const std::string& min_size,
                      const std::vector<std::string>& fill_holes, const std::string& postprocessing);

// In place, in the axes of the image.
void clean(LabelMap& map, const Cleanup& cleanup, const Spacing& spacing, int threads);

}  // namespace fastnnunet::engine
