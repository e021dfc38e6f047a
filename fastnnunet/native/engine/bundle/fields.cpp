#include "bundle/fields.hpp"

#include <cmath>

#include "error.hpp"

namespace fastnnunet::engine {
namespace {

enum class Type {
    any, text, integer, real, boolean, object, texts, integers, reals, booleans, one_pass, halo, locator
};

struct Field {
    const char* name;
    Type type;
    bool is_optional;     // may be null
    const char* missing;  // JSON of its default; null: it must be there
};

constexpr Field kFields[] = {
    {"format_version", Type::integer, false, "2"},
    {"name", Type::text, false, nullptr},
    {"configuration", Type::text, false, nullptr},
    {"channel_names", Type::texts, false, nullptr},
    {"labels", Type::object, false, nullptr},
    {"regions_class_order", Type::integers, true, "null"},
    {"num_heads", Type::integer, false, nullptr},
    {"previous_labels", Type::integers, false, "[]"},
    {"file_ending", Type::text, false, nullptr},
    {"reader_writer", Type::text, false, nullptr},
    {"transpose_forward", Type::integers, false, nullptr},
    {"transpose_backward", Type::integers, false, nullptr},
    {"spacing_mm", Type::reals, false, nullptr},
    {"patch_size", Type::integers, false, nullptr},
    {"normalization_schemes", Type::texts, false, nullptr},
    {"use_mask_for_norm", Type::booleans, false, nullptr},
    {"intensity_properties", Type::object, false, nullptr},
    {"resampling", Type::object, false, nullptr},
    {"step_size", Type::real, false, "0.5"},
    {"mirror_axes", Type::integers, true, "null"},
    {"batch_size", Type::integer, true, "null"},
    {"one_pass", Type::one_pass, true, "null"},
    {"locator", Type::locator, true, "null"},
    {"architecture", Type::object, false, nullptr},
    {"plans", Type::object, false, nullptr},
    {"dataset_json", Type::object, false, nullptr},
    {"model_files", Type::texts, false, "[\"model.onnx\"]"},
    {"folds", Type::texts, false, "[]"},
    {"provenance", Type::object, false, nullptr},
    {"files", Type::object, false, nullptr},
};

constexpr Field kOnePassFields[] = {
    {"halo", Type::integers, false, nullptr},
    {"multiples", Type::integers, false, nullptr},
    {"halo_is", Type::halo, false, nullptr},
    {"bytes_per_voxel", Type::integer, false, nullptr},
};

constexpr Field kLocatorFields[] = {
    {"model_file", Type::text, false, nullptr},     {"factor", Type::integers, false, nullptr},
    {"patch_size", Type::integers, false, nullptr}, {"one_pass", Type::one_pass, true, "null"},
    {"architecture", Type::object, false, nullptr}, {"threshold", Type::real, false, nullptr},
    {"margin_mm", Type::real, false, nullptr},
};

struct Wrong {
    std::string what;
};

// Python's `_shown` of specs/load.py; ASCII alone, where Python would print other letters as they are
std::string got(const Json& value) {
    const std::string text = value.python();
    return text.size() <= 200 ? text : text.substr(0, 197) + "...";
}

void coerce(Json& value, Type type, bool is_optional);

template <std::size_t count>
std::string fields_problems(Json& raw, const Field (&fields)[count], const std::string& where) {
    Problems problems;
    std::string known;
    for (const Field& field : fields) known += (known.empty() ? "" : ", ") + std::string(field.name);
    for (const auto& [name, value] : raw.members()) {
        bool is_known = false;
        for (const Field& field : fields) is_known = is_known || name == field.name;
        if (!is_known) problems.push_back("unknown field " + python_text(name) + "; known: " + known);
    }
    for (const Field& field : fields) {
        Json* value = const_cast<Json*>(raw.find(field.name));
        if (value != nullptr) {
            try {
                coerce(*value, field.type, field.is_optional);
            } catch (const Wrong& e) {
                problems.push_back(std::string("field '") + field.name + "': " + e.what);
            }
        } else if (field.missing == nullptr) {
            problems.push_back(std::string("field '") + field.name + "' is missing");
        } else {
            raw.members().emplace_back(field.name, parse_json(field.missing, field.name));
        }
    }
    if (problems.empty()) return "";
    std::string message = where + ": " + std::to_string(problems.size()) + " problem(s)\n";
    for (const std::string& problem : problems) message += (message.back() == '\n' ? "" : "\n") + ("  - " + problem);
    return message;
}

[[noreturn]] void mistyped(const Json& value, const char* expected) {
    throw Wrong{"got " + got(value) + " (" + value.type_name() + "), expected " + expected};
}

void check_range(const Json& value) {
    if (value.is(Json::Kind::integer) && !value.integer()) throw Wrong{"got a number of more than 64 bits"};
}

void coerce_plainly(Json& value, Type type) {
    using Kind = Json::Kind;
    const auto each = [&](Type inner) {
        if (!value.is(Kind::list)) throw Wrong{"got " + got(value) + ", expected a list"};
        for (Json& item : value.items()) coerce(item, inner, false);
    };
    const auto nested = [&](const auto& fields, const char* name) {
        if (!value.is(Kind::object)) throw Wrong{"got " + got(value) + ", expected a mapping"};
        std::string problems = fields_problems(value, fields, name);
        for (char& c : problems) c = c == '\n' ? ' ' : c;
        if (!problems.empty()) throw Wrong{problems};
    };
    switch (type) {
        case Type::any: return;
        case Type::texts: return each(Type::text);
        case Type::integers: return each(Type::integer);
        case Type::reals: return each(Type::real);
        case Type::booleans: return each(Type::boolean);
        case Type::object:
            if (!value.is(Kind::object)) throw Wrong{"got " + got(value) + ", expected a mapping"};
            return;
        case Type::halo:
            if (value.is(Kind::text) && (value.text() == "exact" || value.text() == "measured")) return;
            throw Wrong{"got " + got(value) + ", expected one of 'exact', 'measured'"};
        case Type::one_pass: return nested(kOnePassFields, "OnePass");
        case Type::locator: return nested(kLocatorFields, "Locator");
        default: break;
    }
    check_range(value);
    if (type == Type::real && value.is(Kind::integer)) {
        value = Json(Kind::real, python_real(value.real()));
        return;
    }
    const auto fits = [&](Type wanted, Kind kind, const char* name) {
        if (type == wanted && !value.is(kind)) mistyped(value, name);
    };
    fits(Type::text, Kind::text, "str");
    fits(Type::integer, Kind::integer, "int");
    fits(Type::real, Kind::real, "float");
    fits(Type::boolean, Kind::boolean, "bool");
}

void coerce(Json& value, Type type, bool is_optional) {
    if (!is_optional) return coerce_plainly(value, type);
    const Json as_given = value;  // without the defaults of its fields
    try {
        coerce_plainly(value, type);
    } catch (const Wrong& e) {
        if (value.is_null()) return;
        std::string none;
        try {
            check_range(as_given);
            none = "got " + got(as_given) + ", expected null";
        } catch (const Wrong& range) {
            none = range.what;
        }
        throw Wrong{none == e.what ? none : e.what + "; " + none};
    }
}

std::string shortened(const std::string& text) { return text.size() <= 100 ? text : text.substr(0, 97) + "..."; }

constexpr std::int64_t kMaxFeatures = 1 << 14, kMaxPerStage = 64, kMaxStages = 32;
constexpr std::size_t kMaxValues = 1 << 14;
constexpr double kMaxNumber = 2147483648.0;

Problems size_problems(const Json& kwargs) {
    using Named = std::pair<const std::string*, const Json*>;
    std::vector<Named> level;
    for (const auto& [name, value] : kwargs.members()) level.emplace_back(&name, &value);
    for (std::size_t count = 0; !level.empty();) {
        count += level.size();
        if (count > kMaxValues) return {"arch_kwargs: got more than " + std::to_string(kMaxValues) + " values"};
        std::vector<Named> below;
        for (const auto& [name, value] : level) {
            for (const Json& item : value->items()) below.emplace_back(name, &item);
            for (const auto& member : value->members()) below.emplace_back(name, &member.second);
            if (value->is_number() && !(is_number(*value) && std::abs(value->real()) <= kMaxNumber)) {
                return {*name + ": got " + shown(*value) + ", expected a finite number up to 2147483648"};
            }
        }
        level = std::move(below);
    }
    return {};
}

template <class Fits>
Problems listed(const std::string& name, const Json& value, std::optional<std::int64_t> count,
                const std::string& expected, const Fits& fits) {
    if (!value.is(Json::Kind::list) && fits(value)) return {};
    bool good = value.is(Json::Kind::list) && value.items().size() <= static_cast<std::size_t>(kMaxStages) &&
                (!count || static_cast<std::int64_t>(value.items().size()) == *count);
    if (good) {
        for (const Json& item : value.items()) good = good && fits(item);
    }
    if (good) return {};
    const std::string each = count ? "each of " + std::to_string(*count) + " stages" : "each stage";
    return {name + ": got " + shown(value) + ", expected whole numbers from " + expected + ", for " + each};
}

void append(Problems& to, const Problems& more) { to.insert(to.end(), more.begin(), more.end()); }

Problems range_problems(const Json& kwargs, std::size_t dims) {
    const Json* stages_value = kwargs.find("n_stages");
    if (stages_value != nullptr && stages_value->is_null()) stages_value = nullptr;
    if (stages_value != nullptr && !is_integer(*stages_value, 1, kMaxStages)) {
        return {"n_stages: got " + shown(*stages_value) + ", expected a whole number from 1 to 32"};
    }
    std::optional<std::int64_t> stages;
    if (stages_value != nullptr) stages = stages_value->integer();
    Problems problems;
    struct PerStage {
        const char* name;
        std::int64_t fewer, most;
    };
    for (const auto& [name, fewer, most] : {PerStage{"features_per_stage", 0, kMaxFeatures},
                                            {"n_conv_per_stage", 0, kMaxPerStage},
                                            {"n_blocks_per_stage", 0, kMaxPerStage},
                                            {"n_conv_per_stage_decoder", 1, kMaxPerStage}}) {
        const Json* value = kwargs.find(name);
        if (value == nullptr) continue;
        const std::optional<std::int64_t> count = stages ? std::optional(*stages - fewer) : std::nullopt;
        append(problems, listed(name, *value, count, "1 to " + std::to_string(most),
                                [most = most](const Json& one) { return is_integer(one, 1, most); }));
    }
    for (const auto& [name, most] : {std::pair<const char*, std::int64_t>{"kernel_sizes", 63}, {"strides", 64}}) {
        const Json* value = kwargs.find(name);
        if (value == nullptr) continue;
        const std::string expected = "1 to " + std::to_string(most) + ", or " + std::to_string(dims) + " of them";
        append(problems, listed(name, *value, stages, expected, [&, limit = most](const Json& one) {
            if (!one.is(Json::Kind::list)) return is_integer(one, 1, limit);
            bool good = one.items().size() == dims;
            for (const Json& item : one.items()) good = good && is_integer(item, 1, limit);
            return good;
        }));
    }
    for (const auto& [name, most] : {std::pair<const char*, std::int64_t>{"embed_dim", kMaxFeatures},
                                     {"eva_depth", 256},
                                     {"eva_numheads", 1024},
                                     {"stem_channels", kMaxFeatures}}) {
        const Json* value = kwargs.find(name);
        if (value != nullptr && !value->is_null() && !is_integer(*value, 1, most)) {
            problems.push_back(std::string(name) + ": got " + shown(*value) + ", expected a whole number from 1 to " +
                               std::to_string(most));
        }
    }
    if (const Json* operation = kwargs.find("conv_op"); operation != nullptr && operation->is(Json::Kind::text)) {
        const std::string& text = operation->text();
        const std::size_t dot = text.rfind('.');
        std::string last = dot == std::string::npos ? "" : text.substr(dot + 1);
        if (last.rfind("Lazy", 0) == 0) last = last.substr(4);
        if (last.size() == 6 && last.rfind("Conv", 0) == 0 && last[5] == 'd' && last[4] >= '1' && last[4] <= '3' &&
            static_cast<std::size_t>(last[4] - '0') != dims) {
            problems.push_back("conv_op: got " + shown(*operation) + ", expected one of " + std::to_string(dims) +
                               " axes, as the patch has");
        }
    }
    return problems;
}

}  // namespace

void check_fields(Json& raw, const std::string& where) {
    const std::string problems = fields_problems(raw, kFields, where);
    if (!problems.empty()) throw CorruptError(problems + "\nexport the bundle again");
}

std::string shown(const Json& value) { return shortened(value.python()); }

std::string shown_tuple(const Json& list) {
    if (!list.is(Json::Kind::list)) return shown(list);
    std::string text = list.python();
    text.front() = '(';
    text.back() = ')';
    if (list.items().size() == 1) text.insert(text.size() - 1, ",");
    return shortened(text);
}

std::string shown_text(const std::string& text) { return shortened(python_text(text)); }

bool is_integer(const Json& value, std::int64_t low, std::int64_t high) {
    const std::optional<std::int64_t> number = value.integer();
    return number && *number >= low && *number <= high;
}

bool is_number(const Json& value) {
    if (value.is(Json::Kind::integer)) return value.integer() && *value.integer() != INT64_MIN;
    return value.is(Json::Kind::real) && std::isfinite(value.real());
}

bool is_list(const Json* value, std::size_t length) {
    return value != nullptr && value->is(Json::Kind::list) && value->items().size() == length;
}

Problems architecture_problems(const Json& architecture, std::size_t dims) {
    const Json none;
    const auto member = [&](const char* key) {
        const Json* found = architecture.find(key);
        return found == nullptr ? &none : found;
    };
    const Json *name = member("network_class_name"), *kwargs = member("arch_kwargs"),
               *imports = member("_kw_requires_import");
    Problems problems;
    if (!name->is(Json::Kind::text)) {
        problems.push_back("network_class_name: got " + shown(*name) + ", expected the name of a class");
    }
    bool are_names = imports->is(Json::Kind::list);
    for (const Json& item : imports->items()) are_names = are_names && item.is(Json::Kind::text);
    if (!are_names) problems.push_back("_kw_requires_import: got " + shown(*imports) + ", expected names of arguments");
    if (!kwargs->is(Json::Kind::object)) {
        problems.push_back("arch_kwargs: got " + shown(*kwargs) + ", expected arguments by name");
        return problems;
    }
    append(problems, size_problems(*kwargs));
    return problems.empty() ? range_problems(*kwargs, dims) : problems;
}

Problems unet_problems(const Json& architecture, const Json& sizes, const std::string& what) {
    const std::string& name = architecture.find("network_class_name")->text();
    const std::string last = name.substr(name.rfind('.') + 1);
    const Json* strides = architecture.find("arch_kwargs")->find("strides");
    if ((last != "PlainConvUNet" && last != "ResidualEncoderUNet" && last != "ResidualUNet") || strides == nullptr ||
        !strides->is(Json::Kind::list)) {
        return {};
    }
    std::vector<double> total(sizes.items().size(), 1);  // as large as 64^32
    for (const Json& stride : strides->items()) {
        for (std::size_t axis = 0; axis < total.size(); ++axis) {
            total[axis] *= (stride.is(Json::Kind::list) ? stride.items()[axis] : stride).real();
        }
    }
    Problems problems;
    for (std::size_t axis = 0; axis < total.size(); ++axis) {
        const double size = sizes.items()[axis].real();
        if (std::fmod(size, total[axis]) == 0) continue;
        const std::string product = Json(Json::Kind::real, python_real(total[axis])).text();
        problems.push_back(what + " axis " + std::to_string(axis) + ": got " + sizes.items()[axis].text() +
                           ", expected a multiple of " + product.substr(0, product.find(".0")) +
                           " (the product of the strides)");
    }
    return problems;
}

}  // namespace fastnnunet::engine
