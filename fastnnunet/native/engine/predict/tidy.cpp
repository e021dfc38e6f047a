#include "predict/tidy.hpp"

#include <cmath>
#include <set>
#include <sstream>

#include "bundle/file.hpp"
#include "core/label_maps.hpp"
#include "error.hpp"

namespace fastnnunet::engine {
namespace {

constexpr const char* kFunction = "remove_all_but_largest_component_from_segmentation";

using Labels = std::vector<std::int64_t>;

// A label, a region or a list of both. False where there is something else.
bool flatten(const Json& value, Labels& to) {
    if (value.is(Json::Kind::list)) {
        for (const Json& item : value.items()) {
            if (!flatten(item, to)) return false;
        }
        return true;
    }
    if (value.is(Json::Kind::text)) {
        if (value.text().empty() || value.text().size() > 9 ||
            value.text().find_first_not_of("0123456789") != std::string::npos) {
            return false;
        }
        to.push_back(std::stol(value.text()));
        return true;
    }
    if (!value.integer()) return false;
    to.push_back(*value.integer());
    return true;
}

}  // namespace

std::vector<NamedLabels> named_labels(const Json& labels) {
    std::vector<NamedLabels> found;
    for (const auto& [name, value] : labels.members()) {
        Labels flat;
        flatten(value, flat);
        if (name != "ignore" && flat != Labels{0}) found.push_back({name, flat});
    }
    return found;
}

namespace {

std::vector<Labels> structures(const std::string& word, const std::vector<NamedLabels>& named, const char* option) {
    std::set<std::int64_t> values;
    for (const NamedLabels& one : named) values.insert(one.labels.begin(), one.labels.end());
    values.erase(0);
    if (word == "all") return {Labels(values.begin(), values.end())};
    std::vector<Labels> each;
    for (const NamedLabels& one : named) each.push_back(one.labels);
    if (word == "each") return each;
    Labels joined_labels;
    std::string rest = word + "+";
    for (std::size_t at = 0; at < rest.size();) {
        const std::size_t end = rest.find('+', at);
        const std::string part = rest.substr(at, end - at);
        at = end + 1;
        const auto found = std::find_if(named.begin(), named.end(), [&](const NamedLabels& one) { return one.name == part; });
        const bool is_number =
            !part.empty() && part.size() < 10 && part.find_first_not_of("0123456789") == std::string::npos;
        if (found != named.end()) {
            joined_labels.insert(joined_labels.end(), found->labels.begin(), found->labels.end());
        } else if (is_number && values.count(std::stol(part)) > 0) {
            joined_labels.push_back(std::stol(part));
        } else {
            std::string known;
            for (const NamedLabels& one : named) {
                std::string sum;
                for (const std::int64_t label : one.labels) sum += (sum.empty() ? "" : "+") + std::to_string(label);
                known += (known.empty() ? "" : ", ") + one.name + " (" + sum + ")";
            }
            throw SpecError(std::string(option) + ": " + python_text(part) +
                            " is no label of this model, expected all, each, " + "or of " + known);
        }
    }
    return {joined_labels};
}

std::vector<Cleanup::KeepLargest> read_postprocessing(const std::string& path) {
    if (!is_regular_file(path)) {
        throw NotFoundError("postprocessing file not found: " + path + "\nnnUNetv2_determine_postprocessing and " +
                            "nnUNetv2_find_best_configuration write postprocessing.pkl");
    }
    if (path.size() < 5 || path.substr(path.size() - 5) != ".json") {
        throw SpecError(path + ": this engine reads no pickles, which can run any code\n" +
                        "give the postprocessing.json that nnU-Net writes beside it, or tidy afterwards: " +
                        "fastnnunet postprocess -i LABELS -o TIDIED -pp_pkl_file " + path);
    }
    const MappedFile file(path);
    const Json raw = parse_json(file.bytes(), path);
    const Json *names = raw.find("postprocessing_fns"), *arguments = raw.find("postprocessing_kwargs");
    if (names == nullptr || arguments == nullptr || !names->is(Json::Kind::list) || !arguments->is(Json::Kind::list) ||
        names->items().size() != arguments->items().size()) {
        throw CorruptError(path + " is not a postprocessing file of nnU-Net\nexpected postprocessing_fns and " +
                           "postprocessing_kwargs, lists of the same length");
    }
    std::vector<Cleanup::KeepLargest> steps;
    for (std::size_t i = 0; i < names->items().size(); ++i) {
        const Json &name = names->items()[i], &kwargs = arguments->items()[i];
        const Json *labels = kwargs.find("labels_or_regions"), *background = kwargs.find("background_label");
        const std::size_t known = (labels != nullptr) + (background != nullptr);
        if (name.text() != kFunction || labels == nullptr || kwargs.members().size() != known) {
            throw SpecError(path + " asks for " + name.text() + " with " + kwargs.python() + ", expected " + kFunction +
                            " with labels_or_regions\napply it with nnUNetv2_apply_postprocessing");
        }
        Cleanup::KeepLargest step;
        if (!flatten(*labels, step.labels) || (background != nullptr && !background->integer())) {
            throw CorruptError(path + ": labels_or_regions and background_label: got " + kwargs.python() +
                               ", expected integers");
        }
        if (background != nullptr) step.background = *background->integer();
        steps.push_back(step);
    }
    return steps;
}

}  // namespace

Cleanup parse_cleanup(const Json& labels, const std::vector<std::string>& keep_largest, const std::string& min_size,
                      const std::vector<std::string>& fill_holes, const std::string& postprocessing) {
    const std::vector<NamedLabels> named = named_labels(labels);
    Cleanup cleanup;
    if (!postprocessing.empty()) cleanup.keep_largest = read_postprocessing(postprocessing);
    for (const std::string& word : keep_largest) {
        for (const Labels& one : structures(word, named, "--keep-largest")) cleanup.keep_largest.push_back({one, 0});
    }
    for (const std::string& word : fill_holes) {
        for (const Labels& one : structures(word, named, "--fill-holes")) {
            for (const std::int64_t label : one) {
                const auto& so_far = cleanup.fill_holes;
                if (std::find(so_far.begin(), so_far.end(), label) == so_far.end()) cleanup.fill_holes.push_back(label);
            }
        }
    }
    if (!min_size.empty()) {
        const std::size_t first = std::min(min_size.find_first_not_of(" \t\n\r\f\v"), min_size.size());
        std::optional<Measured> given = parse_measured(std::string_view(min_size).substr(first), 300);
        if (given) given->unit.erase(given->unit.find_last_not_of(" \t\n\r\f\v") + 1);
        const bool is_known =
            given && (given->unit.empty() || given->unit == "voxel" || given->unit == "voxels" || given->unit == "mm3");
        if (!is_known || given->number <= 0) {
            throw SpecError("--min-size: got " + python_text(min_size) +
                            ", expected a number of voxels such as 20, or a volume such as 50mm3");
        }
        cleanup.min_size = given->number;
        cleanup.is_mm3 = given->unit == "mm3";
    }
    return cleanup;
}

void clean(LabelMap& map, const Cleanup& cleanup, const Spacing& spacing, int threads) {
    std::visit([&](auto& array) {
        const int few = pass_threads(threads, array.size());
        for (const auto& step : cleanup.keep_largest) keep_largest(array.view(), step.labels, step.background, few);
        if (cleanup.min_size > 0) {
            const double voxel = cleanup.is_mm3 ? spacing[0] * spacing[1] * spacing[2] : 1.0;
            // the tolerance: a size that is a whole number of voxels must not fail by a rounding of the spacing
            remove_small(array.view(), static_cast<std::int64_t>(std::ceil(cleanup.min_size / voxel * (1 - 1e-6))),
                         few);
        }
        if (!cleanup.fill_holes.empty()) fill_label_holes(array.view(), cleanup.fill_holes, few);
    }, map);
}

}  // namespace fastnnunet::engine
