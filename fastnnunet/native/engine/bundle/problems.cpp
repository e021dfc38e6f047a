#include "bundle/problems.hpp"

#include <algorithm>
#include <set>

#include "bundle/fields.hpp"
#include "error.hpp"

namespace fastnnunet::engine {
namespace {

constexpr std::int64_t kOnePassFormat = 3, kLocatorFormat = 4;
constexpr std::int64_t kMaxHeads = 1 << 12, kMaxChannels = 1 << 10, kMaxAxis = 1 << 15, kMaxPatchVoxels = 1 << 28;
constexpr std::int64_t kMaxFactor = 64;
constexpr double kMaxMarginMm = 1e6;

void append(Problems& to, const Problems& more) { to.insert(to.end(), more.begin(), more.end()); }

std::string number(std::int64_t value) { return std::to_string(value); }

// Python's str of a float
std::string real_text(const Json& value) { return value.text(); }

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

bool is_label(const Json& value) {
    if (value.is(Json::Kind::text)) {
        const std::string& text = value.text();
        return !text.empty() && text.size() <= 5 && text.find_first_not_of("0123456789") == std::string::npos &&
               std::stol(text) < 65536;
    }
    return is_integer(value, 0, 65535);
}

bool are_labels(const Json& list) {
    return list.is(Json::Kind::list) && !list.items().empty() &&
           std::all_of(list.items().begin(), list.items().end(), is_label);
}

bool is_name(const std::string& name) {
    return !name.empty() && name.size() <= 255 && is_printable(name) && name != "." && name != ".." &&
           name.find_first_of("/\\") == std::string::npos;
}

bool is_file_ending(const std::string& text) {
    std::size_t parts = 0, letters = 0;
    for (const char c : text) {
        if (c == '.') {
            if (parts > 0 && letters == 0) return false;
            ++parts;
            letters = 0;
        } else {
            const bool known = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' ||
                               c == '+' || c == '-';
            if (!known || parts == 0 || ++letters > 32) return false;
        }
    }
    return parts >= 1 && parts <= 8 && letters > 0;
}

Problems patch_size_problems(const Json& patch) {
    const std::size_t dims = patch.items().size();
    bool good = dims == 2 || dims == 3;
    for (const Json& size : patch.items()) good = good && is_integer(size, 1, kMaxAxis);
    if (!good) {
        return {"patch_size: got " + shown_tuple(patch) + ", expected two or three whole numbers from 1 to " +
                number(kMaxAxis)};
    }
    std::int64_t voxels = 1;
    for (const Json& size : patch.items()) voxels *= *size.integer();
    if (voxels <= kMaxPatchVoxels) return {};
    return {"patch_size: got " + shown_tuple(patch) + ", expected at most " + number(kMaxPatchVoxels) +
            " voxels in all"};
}

bool is_permutation(const Json& list) {
    if (list.items().size() != 3) return false;
    std::set<std::int64_t> found;
    for (const Json& item : list.items()) found.insert(item.integer().value_or(-1));
    return found == std::set<std::int64_t>{0, 1, 2};
}

Problems transpose_problems(const Json& forward, const Json& backward) {
    if (!is_permutation(forward) || !is_permutation(backward)) {
        const auto tuple = [](const Json& list) {
            std::string text = list.python();
            text.front() = '(';
            text.back() = ')';
            if (list.items().size() == 1) text.insert(text.size() - 1, ",");
            return text;
        };
        std::string both = "(" + tuple(forward) + ", " + tuple(backward) + ")";
        if (both.size() > 100) both = both.substr(0, 97) + "...";
        return {"transpose_forward, transpose_backward: got " + both + ", expected permutations of 0, 1, 2"};
    }
    for (std::size_t i = 0; i < 3; ++i) {
        if (*forward.items()[*backward.items()[i].integer()].integer() != static_cast<std::int64_t>(i)) {
            return {"transpose_backward: got " + shown_tuple(backward) + ", expected what undoes " +
                    shown_tuple(forward)};
        }
    }
    return {};
}

Problems scheme_problems(const Json& schemes, const Json& masks, std::size_t channels) {
    if (schemes.items().size() != channels) {
        return {"normalization_schemes: got " + shown_tuple(schemes) + ", expected " + number(channels) +
                " names, one for each channel"};
    }
    if (masks.items().size() != channels) {
        return {"use_mask_for_norm: got " + shown_tuple(masks) + ", expected true or false for each of " +
                number(channels) + " channel(s)"};
    }
    return {};
}

Problems intensity_problems(const Json& properties, const Json& schemes) {
    for (const auto& [channel, one] : properties.members()) {
        if (!one.is(Json::Kind::object)) {
            return {"intensity_properties: got " + shown(properties) + ", expected statistics for each channel"};
        }
    }
    Problems problems;
    for (std::size_t index = 0; index < schemes.items().size(); ++index) {
        const Json* statistics = properties.find(std::to_string(index));
        if (schemes.items()[index].text() != "CTNormalization" || statistics == nullptr) continue;
        for (const char* key : {"mean", "std", "percentile_00_5", "percentile_99_5"}) {
            const Json* value = statistics->find(key);
            if (value == nullptr || is_number(*value) || problems.size() == 5) continue;
            problems.push_back("intensity_properties: channel " + number(static_cast<std::int64_t>(index)) + " has " +
                               key + " " + shown(*value) + ", expected a finite number");
        }
    }
    return problems;
}

Problems label_problems(const Json& labels, const Json& order) {
    if (labels.members().empty() || labels.members().size() > 65536) {
        return {"labels: got " + shown(labels) + ", expected names with their values"};
    }
    Problems wrong;
    for (const auto& [name, value] : labels.members()) {
        if (is_label(value) || are_labels(value)) continue;
        wrong.push_back("labels: " + shown_text(name) + " has " + shown(value) +
                        ", expected a whole number from 0 to 65535, or a list of them");
    }
    if (!order.is_null() && !are_labels(order)) {
        wrong.push_back("regions_class_order: got " + shown_tuple(order) + ", expected a list of labels");
    }
    if (wrong.size() > 5) wrong.resize(5);
    return wrong;
}

Problems resampling_problems(const Json& resampling, const std::string& kind) {
    const Json none;
    const std::string name = "resampling." + kind;
    const Json* entry = resampling.find(kind);
    const Json* function = entry == nullptr ? nullptr : entry->find("fn");
    if (function == nullptr || !function->is(Json::Kind::text)) {
        return {name + ": got " + shown(entry == nullptr ? none : *entry) +
                ", expected the name of a function (fn) and its arguments (kwargs)"};
    }
    const Json* kwargs = entry->find("kwargs");
    if (kwargs == nullptr || kwargs->is_null()) return {};
    if (!kwargs->is(Json::Kind::object)) {
        return {name + ": got arguments " + shown(*kwargs) + ", expected names with values"};
    }
    Problems problems;
    for (const auto& [key, value] : kwargs->members()) {
        const bool is_switch = value.is(Json::Kind::boolean);
        const auto refuse = [&, &key = key, &value = value](bool is_good, const char* expected) {
            if (!is_good) problems.push_back(name + ": " + key + " is " + shown(value) + ", expected " + expected);
        };
        if (key == "order" || key == "order_z") refuse(is_integer(value, 0, 5), "a whole number from 0 to 5");
        if (key == "is_seg") refuse(is_switch, "true or false");
        if (key == "force_separate_z") refuse(is_switch || value.is_null(), "true, false or null");
        if (key == "separate_z_anisotropy_threshold") refuse(is_number(value), "a number");
    }
    return problems;
}

Problems one_pass_problems(const Json& one_pass, const Json& patch, const Json& batch_size, bool has_format) {
    Problems problems;
    const std::size_t dims = patch.items().size();
    for (const auto& [name, low] : {std::pair<const char*, std::int64_t>{"halo", 0}, {"multiples", 1}}) {
        const Json& value = *one_pass.find(name);
        bool good = value.items().size() == dims;
        for (const Json& item : value.items()) good = good && is_integer(item, low, kMaxAxis);
        if (good) continue;
        problems.push_back(std::string("one_pass.") + name + ": got " + shown_tuple(value) + ", expected " +
                           number(static_cast<std::int64_t>(dims)) + " whole numbers, " + number(low) + " to " +
                           number(kMaxAxis));
    }
    const Json& bytes = *one_pass.find("bytes_per_voxel");
    if (!is_integer(bytes, 8, 1 << 24)) {
        problems.push_back("one_pass.bytes_per_voxel: got " + shown(bytes) + ", expected 8 to 16777216");
    }
    const Json& multiples = *one_pass.find("multiples");
    bool divide = true;
    for (std::size_t axis = 0; problems.empty() && axis < dims; ++axis) {
        divide = divide && *patch.items()[axis].integer() % *multiples.items()[axis].integer() == 0;
    }
    if (!divide) {
        problems.push_back("one_pass.multiples: got " + shown_tuple(multiples) + ", expected divisors of " +
                           shown_tuple(patch));
    }
    if (!batch_size.is_null()) {
        problems.push_back("one_pass: the model takes exactly " + batch_size.text() +
                           " patches at once, expected any number");
    }
    if (!has_format) problems.push_back("one_pass: bundles of this format version have none");
    return problems;
}

Problems locator_problems(const Json& raw) {
    const auto field = [&](const char* name) -> const Json& { return *raw.find("locator")->find(name); };
    const std::size_t dims = raw.find("patch_size")->items().size();
    Problems problems;
    if (*raw.find("format_version")->integer() < kLocatorFormat) {
        problems.push_back("locator: bundles of this format version have none");
    }
    if (dims != 3) {
        problems.push_back("locator: a bundle of two axes has none");
        return problems;
    }
    if (!raw.find("previous_labels")->items().empty()) problems.push_back("locator: a cascade stage has none");
    if (raw.find("labels")->find("ignore") != nullptr) {
        problems.push_back("locator: a model with an ignore label has none");
    }
    const Json &factor = field("factor"), &threshold = field("threshold"), &margin = field("margin_mm");
    bool good = factor.items().size() == dims;
    for (const Json& one : factor.items()) good = good && is_integer(one, 1, kMaxFactor);
    if (!good) {
        problems.push_back("locator.factor: got " + shown_tuple(factor) + ", expected 3 whole numbers from 1 to " +
                           number(kMaxFactor));
    }
    if (!is_number(threshold) || !(threshold.real() > 0 && threshold.real() < 1)) {
        problems.push_back("locator.threshold: got " + shown(threshold) + ", expected a number between 0 and 1");
    }
    if (!is_number(margin) || !(margin.real() >= 0 && margin.real() <= kMaxMarginMm)) {
        problems.push_back("locator.margin_mm: got " + shown(margin) + ", expected 0 to 1e+06");
    }
    const Json &patch = field("patch_size"), &architecture = field("architecture"), &one_pass = field("one_pass");
    Problems wrong = patch_size_problems(patch);
    if (wrong.empty() && patch.items().size() != dims) {
        wrong = {"patch_size: got " + shown_tuple(patch) + ", expected 3 numbers"};
    }
    if (wrong.empty()) {
        wrong = architecture_problems(architecture, dims);
        if (wrong.empty()) wrong = unet_problems(architecture, patch, "patch_size");
        if (!one_pass.is_null()) {
            Problems more = one_pass_problems(one_pass, patch, Json(), true);
            if (more.empty() && wrong.empty()) {
                more = unet_problems(architecture, *one_pass.find("multiples"), "one_pass.multiples");
            }
            append(wrong, more);
        }
    }
    for (const std::string& problem : wrong) problems.push_back("locator." + problem);
    return problems;
}

Problems field_problems(const Json& raw) {
    const auto field = [&](const char* name) -> const Json& { return *raw.find(name); };
    const Json &patch = field("patch_size"), &spacing = field("spacing_mm"), &one_pass = field("one_pass");
    const std::size_t dims = patch.items().size(), channels = field("channel_names").items().size();
    Problems problems;
    bool good = spacing.items().size() == dims;
    for (const Json& size : spacing.items()) good = good && size.real() >= 1e-9 && size.real() <= 1e9;
    if (!good) {
        problems.push_back("spacing_mm: got " + shown_tuple(spacing) + ", expected " + number(dims) +
                           " numbers above 0 (mm), one for each axis of the patch");
    }
    append(problems, transpose_problems(field("transpose_forward"), field("transpose_backward")));
    if (channels < 1 || channels > static_cast<std::size_t>(kMaxChannels)) {
        problems.push_back("channel_names: got " + number(channels) + " names, expected 1 to " + number(kMaxChannels));
    }
    append(problems, scheme_problems(field("normalization_schemes"), field("use_mask_for_norm"), channels));
    append(problems, intensity_problems(field("intensity_properties"), field("normalization_schemes")));
    append(problems, label_problems(field("labels"), field("regions_class_order")));
    if (!is_integer(field("num_heads"), 1, kMaxHeads)) {
        problems.push_back("num_heads: got " + field("num_heads").text() + ", expected 1 to " + number(kMaxHeads));
    }
    const Json& previous = field("previous_labels");
    good = previous.items().size() <= static_cast<std::size_t>(kMaxChannels);
    for (const Json& label : previous.items()) good = good && is_integer(label, 0, 65536);
    if (!good) problems.push_back("previous_labels: got " + shown_tuple(previous) + ", expected labels");
    if (!is_file_ending(field("file_ending").text())) {
        problems.push_back("file_ending: got " + shown(field("file_ending")) + ", expected one such as .nii.gz");
    }
    for (const char* name : {"name", "configuration", "reader_writer"}) {
        if (is_printable(field(name).text())) continue;
        problems.push_back(std::string(name) + ": got " + shown(field(name)) +
                           ", expected text without control characters");
    }
    good = true;
    for (const char* name : {"channel_names", "folds"}) {
        for (const Json& text : field(name).items()) good = good && is_printable(text.text());
    }
    if (!good) problems.push_back("channel_names, folds: got control characters, expected text without them");
    const Json& step = field("step_size");
    if (!(step.real() >= 0.01 && step.real() <= 1)) {
        problems.push_back("step_size: got " + real_text(step) + ", expected a number from 0.01 to 1");
    }
    const Json& mirrors = field("mirror_axes");
    std::set<std::int64_t> axes;
    good = true;
    for (const Json& axis : mirrors.items()) {
        good = good && is_integer(axis, 0, static_cast<std::int64_t>(dims) - 1) && axes.insert(*axis.integer()).second;
    }
    if (!good) {
        problems.push_back("mirror_axes: got " + shown_tuple(mirrors) + ", expected each axis of " + number(dims) +
                           " at most once, counted from 0");
    }
    const Json& batch = field("batch_size");
    if (!batch.is_null() && !is_integer(batch, 1, 1024)) {
        problems.push_back("batch_size: got " + batch.text() + ", expected 1 to 1024");
    }
    if (!one_pass.is_null()) {
        append(problems,
               one_pass_problems(one_pass, patch, batch, *field("format_version").integer() >= kOnePassFormat));
    }
    if (!field("locator").is_null()) append(problems, locator_problems(raw));
    append(problems, resampling_problems(field("resampling"), "data"));
    append(problems, resampling_problems(field("resampling"), "probabilities"));
    if (!previous.items().empty()) append(problems, resampling_problems(field("resampling"), "seg"));
    Problems wrong = architecture_problems(field("architecture"), dims);
    if (wrong.empty()) wrong = unet_problems(field("architecture"), patch, "patch_size");
    if (wrong.empty() && problems.empty() && !one_pass.is_null()) {
        wrong = unet_problems(field("architecture"), *one_pass.find("multiples"), "one_pass.multiples");
    }
    append(problems, wrong);
    return problems;
}

bool are_distinct(const Json& list) {
    std::set<std::string> found;
    for (const Json& item : list.items()) found.insert(item.text());
    return found.size() == list.items().size();
}

Problems file_problems(const Json& raw) {
    const Json &files = *raw.find("files"), &models = *raw.find("model_files"), &folds = *raw.find("folds");
    Problems problems;
    for (const auto& [name, digest] : files.members()) {
        if (is_name(name)) continue;
        problems.push_back("files: " + shown_text(name) +
                           " is no name of a file in the bundle, expected one without '/' or control characters");
    }
    for (const auto& [name, digest] : files.members()) {
        if (digest.is(Json::Kind::text) && digest.text().size() == 64 &&
            digest.text().find_first_not_of("0123456789abcdef") == std::string::npos) {
            continue;
        }
        problems.push_back("files: " + shown_text(name) + " has the digest " + shown(digest) +
                           ", expected a SHA-256 in hex");
    }
    if (models.items().empty() || !are_distinct(models)) {
        problems.push_back("model_files: got " + shown_tuple(models) + ", expected at least one, each once");
    }
    for (const Json& name : models.items()) {
        if (files.find(name.text()) != nullptr) continue;
        problems.push_back("model_files: " + shown(name) + " has no digest in files, expected one for each model file");
    }
    for (const Json& name : models.items()) {
        if (ends_with(name.text(), ".onnx")) continue;
        problems.push_back("model_files: got " + shown(name) + ", expected the name of an ONNX file");
    }
    if (const Json& locator = *raw.find("locator"); !locator.is_null()) {
        const Json& name = *locator.find("model_file");
        bool is_own = files.find(name.text()) != nullptr && ends_with(name.text(), ".onnx");
        for (const Json& model : models.items()) is_own = is_own && model.text() != name.text();
        if (!is_own) {
            problems.push_back("locator.model_file: got " + shown(name) +
                               ", expected an ONNX file in files, no model file");
        }
    }
    for (const auto& [name, digest] : files.members()) {
        if (!ends_with(name, ".xml")) continue;
        const std::string weights = name.substr(0, name.size() - 4) + ".bin";
        if (files.find(weights) != nullptr) continue;
        problems.push_back("files: " + shown_text(name) + " has no digest for its weights, " + shown_text(weights));
    }
    if (!folds.items().empty() && (folds.items().size() != models.items().size() || !are_distinct(folds))) {
        problems.push_back("folds: got " + shown_tuple(folds) + ", expected one for each of " +
                           number(models.items().size()) + " model files");
    }
    return problems;
}

}  // namespace

void check_spec(const Json& raw, const std::string& path) {
    Problems problems = patch_size_problems(*raw.find("patch_size"));
    if (problems.empty()) problems = field_problems(raw);
    append(problems, file_problems(raw));
    if (problems.empty()) return;
    std::string message = path + " cannot be used, " + number(problems.size()) + " problem(s):\n";
    for (std::size_t i = 0; i < std::min<std::size_t>(20, problems.size()); ++i) message += "  - " + problems[i] + "\n";
    throw CorruptError(message + "export the bundle again");
}

}  // namespace fastnnunet::engine
