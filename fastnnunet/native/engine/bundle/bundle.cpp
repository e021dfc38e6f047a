#include "bundle/bundle.hpp"

#include <algorithm>

#include "bundle/digest.hpp"
#include "bundle/fields.hpp"
#include "bundle/file.hpp"
#include "bundle/onnx_file.hpp"
#include "bundle/problems.hpp"
#include "error.hpp"

namespace fastnnunet::engine {
namespace {

constexpr std::int64_t kFormats = 4;

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

void check_inside(const std::string& folder, const std::string& name) {
    const std::string path = joined(folder, name);
    if (!is_link(path)) return;
    throw CorruptError(path + " is a link, expected a file inside the bundle\ncopy the bundle with what it links to: " +
                       "cp -rL " + folder + " COPY");
}

using Shape = std::vector<std::optional<std::int64_t>>;

std::string shape_text(const Shape& shape) {
    std::string text;
    for (const auto& size : shape) text += (text.empty() ? "" : ", ") + (size ? std::to_string(*size) : "*");
    return "(" + text + ")";
}

bool fits(const OnnxValue& value, const Shape& shape) {
    if (value.element_type != 1 || value.shape.size() != shape.size()) return false;
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        if (value.shape[axis] && value.shape[axis] != shape[axis]) return false;
    }
    return true;
}

void check_model(std::string_view content, const std::string& path, const Bundle& bundle) {
    const OnnxFile model = read_onnx(content, path);
    const std::optional<std::int64_t> batch = bundle.batch_size == 0 ? std::nullopt : std::optional(bundle.batch_size);
    for (const auto& [what, values, axis] : {std::tuple("input", &model.inputs, bundle.channels()),
                                             std::tuple("output", &model.outputs, bundle.num_heads)}) {
        Shape shape{batch, axis};
        for (const std::int64_t size : bundle.patch_size) {
            shape.push_back(bundle.one_pass ? std::nullopt : std::optional(size));
        }
        if (values->size() == 1 && fits(values->front(), shape)) continue;
        std::string got;
        for (std::size_t i = 0; i < std::min<std::size_t>(5, values->size()); ++i) {
            const OnnxValue& value = (*values)[i];
            got += (got.empty() ? "" : "; ") + shown_text(value.name) + " " + shape_text(value.shape) + " of type " +
                   std::to_string(value.element_type);
        }
        throw CorruptError(path + " is not the model that bundle.json describes\n  got      " + what + " " +
                           (got.empty() ? "(none)" : got) + "\n  expected one " + what + " " + shape_text(shape) +
                           " of type 1 (float32), * for any length\nexport the bundle again");
    }
}

template <class T, class Convert>
std::vector<T> list_of(const Json& list, const Convert& convert) {
    std::vector<T> made;
    for (const Json& item : list.items()) made.push_back(convert(item));
    return made;
}

std::int64_t to_integer(const Json& value) { return *value.integer(); }
std::string to_text(const Json& value) { return value.text(); }

Index index_of(const Json& list) {
    return {to_integer(list.items()[0]), to_integer(list.items()[1]), to_integer(list.items()[2])};
}

std::optional<OnePass> one_pass_of(const Json& rules) {
    if (rules.is_null()) return std::nullopt;
    return OnePass{list_of<std::int64_t>(*rules.find("halo"), to_integer),
                   list_of<std::int64_t>(*rules.find("multiples"), to_integer), rules.find("halo_is")->text(),
                   to_integer(*rules.find("bytes_per_voxel"))};
}

Bundle bundle_of(const Json& raw, const std::string& folder) {
    const auto field = [&](const char* name) -> const Json& { return *raw.find(name); };
    Bundle bundle;
    bundle.folder = folder;
    bundle.name = field("name").text();
    bundle.configuration = field("configuration").text();
    bundle.channel_names = list_of<std::string>(field("channel_names"), to_text);
    bundle.labels = field("labels");
    if (const Json& order = field("regions_class_order"); !order.is_null()) {
        bundle.regions_class_order = list_of<std::int64_t>(order, to_integer);
    }
    bundle.num_heads = to_integer(field("num_heads"));
    bundle.previous_labels = list_of<std::int64_t>(field("previous_labels"), to_integer);
    bundle.file_ending = field("file_ending").text();
    bundle.reader_writer = field("reader_writer").text();
    for (std::size_t axis = 0; axis < 3; ++axis) {
        bundle.transpose_forward[axis] = static_cast<int>(to_integer(field("transpose_forward").items()[axis]));
        bundle.transpose_backward[axis] = static_cast<int>(to_integer(field("transpose_backward").items()[axis]));
    }
    bundle.spacing_mm = list_of<double>(field("spacing_mm"), [](const Json& value) { return value.real(); });
    bundle.patch_size = list_of<std::int64_t>(field("patch_size"), to_integer);
    bundle.normalization_schemes = list_of<std::string>(field("normalization_schemes"), to_text);
    bundle.use_mask_for_norm =
        list_of<bool>(field("use_mask_for_norm"), [](const Json& value) { return value.truth(); });
    bundle.intensity_properties = field("intensity_properties");
    bundle.resampling = field("resampling");
    bundle.step_size = field("step_size").real();
    for (const Json& axis : field("mirror_axes").items())
        bundle.mirror_axes.push_back(static_cast<int>(to_integer(axis)));
    bundle.batch_size = field("batch_size").integer().value_or(0);
    bundle.one_pass = one_pass_of(field("one_pass"));
    if (const Json& rules = field("locator"); !rules.is_null()) {
        bundle.locator = Locator{rules.find("model_file")->text(),
                                 index_of(*rules.find("factor")),
                                 list_of<std::int64_t>(*rules.find("patch_size"), to_integer),
                                 one_pass_of(*rules.find("one_pass")),
                                 rules.find("threshold")->real(),
                                 rules.find("margin_mm")->real()};
    }
    bundle.plans = field("plans");
    bundle.dataset_json = field("dataset_json");
    bundle.model_files = list_of<std::string>(field("model_files"), to_text);
    bundle.folds = list_of<std::string>(field("folds"), to_text);
    bundle.provenance = field("provenance");
    for (const auto& [name, digest] : field("files").members()) bundle.files[name] = digest.text();
    return bundle;
}

}  // namespace

std::string int8_file(const std::string& model_file, const std::string& ending) {
    return model_file.substr(0, model_file.rfind('.')) + "_int8" + ending;
}

Bundle of_locator(const Bundle& bundle) {
    const Locator& locator = *bundle.locator;
    Bundle made = bundle;
    made.name = "locator of " + bundle.name;
    made.labels = parse_json(R"({"background": 0, "foreground": 1})", "the labels of a locator");
    made.regions_class_order.reset();
    made.num_heads = 2;
    for (std::size_t axis = 0; axis < made.spacing_mm.size(); ++axis) {
        made.spacing_mm[axis] *= static_cast<double>(locator.factor[axis]);
    }
    made.patch_size = locator.patch_size;
    made.mirror_axes.clear();
    made.batch_size = 0;
    made.one_pass = locator.one_pass;
    made.locator.reset();
    made.model_files = {locator.model_file};
    made.folds.clear();
    return made;
}

Bundle load_bundle(const std::string& folder) {
    const std::string path = joined(folder, "bundle.json");
    if (!is_regular_file(path)) {
        throw NotFoundError("no bundle at " + folder +
                            ": bundle.json is missing\nmake one with: fastnnunet export onnx " + "... -o " + folder);
    }
    check_inside(folder, "bundle.json");
    Json raw;
    try {
        const MappedFile file(path);
        raw = parse_json(file.bytes(), path);
        if (!raw.is(Json::Kind::object)) {
            throw CorruptError(path + ": expected a JSON object, got " + raw.type_name());
        }
    } catch (const CorruptError& e) {
        throw CorruptError(std::string("the bundle's description is damaged: ") + e.what() +
                           "\nexport the bundle again");
    }
    const Json* declared = raw.find("self_sha256");
    const Json* version = raw.find("format_version");
    if (declared == nullptr || declared->is_null() || version == nullptr ||
        !(version->is(Json::Kind::integer) || version->is(Json::Kind::boolean))) {
        throw CorruptError(path + " is damaged (self_sha256 or format_version is missing); export the bundle again");
    }
    if (version->is(Json::Kind::integer) && version->real() > static_cast<double>(kFormats)) {
        throw NewerFormatError(
            path + " has format version " + version->text().substr(0, 20) + ", this fastnnunet reads up to " +
            std::to_string(kFormats) +
            "\nupdate it: pip install --upgrade fastnnunet, or export the bundle again with this version");
    }
    const std::string digest = declared->text();
    raw.erase("self_sha256");
    if (sha256_hex(raw.canonical()) != digest) {
        throw CorruptError(path + " was changed after export (its digest does not match); export the bundle again");
    }
    check_fields(raw, path);
    check_spec(raw, path);
    Bundle bundle = bundle_of(raw, folder);
    for (const auto& [name, member] : raw.find("files")->members()) {
        const std::string file = joined(folder, name);
        check_inside(folder, name);
        if (!is_regular_file(file)) {
            throw CorruptError("bundle " + folder + " is incomplete: " + name + " is missing; export it again");
        }
        const MappedFile content(file);
        const std::string got = sha256_hex(content.bytes());
        if (got != member.text()) {
            throw CorruptError(file + " was changed after export\n  got      sha256 " + got + "\n  expected sha256 " +
                               member.text() + "\nexport the bundle again");
        }
        if (!ends_with(name, ".onnx")) continue;
        const bool is_locator = bundle.locator && name == bundle.locator->model_file;
        check_model(content.bytes(), file, is_locator ? of_locator(bundle) : bundle);
    }
    return bundle;
}

}  // namespace fastnnunet::engine
