// The C interface: no exception leaves it, and what went wrong is kept for the thread.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <sstream>

#include "bundle/digest.hpp"
#include "core/normalize.hpp"
#include "error.hpp"
#include "images/text.hpp"
#include "predict/files.hpp"
#include "predict/model.hpp"

using namespace fastnnunet;
using namespace fastnnunet::engine;

struct fastnnunet_model {
    fastnnunet_model(const std::string& folder, const Settings& settings)
        : model(folder, settings), description(model.describe()) {}

    Model model;
    std::string description;
};

struct fastnnunet_result {
    Prediction prediction;
};

namespace {

thread_local std::string last_error;

struct Cancelled {};

fastnnunet_status failed(fastnnunet_status status, const std::string& message) noexcept {
    try {
        last_error = message;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

template <class Body>
fastnnunet_status guarded(const Body& body) noexcept {
    try {
        body();
        return FASTNNUNET_OK;
    } catch (const Error& e) {
        return failed(e.status, e.what());
    } catch (const Cancelled&) {
        return failed(FASTNNUNET_CANCELLED, "the prediction was cancelled");
    } catch (const std::bad_alloc&) {
        return failed(FASTNNUNET_NO_MEMORY, "not enough memory\nclose other programs, or crop the image");
    } catch (const std::exception& e) {
        return failed(FASTNNUNET_INTERNAL, std::string("unexpected: ") + e.what() +
                                               "\nplease report it, with the shape and the header of the image");
    } catch (...) {
        return failed(FASTNNUNET_INTERNAL, "unexpected: an exception of a type that is not known");
    }
}

// A struct of the caller's, which may be of an older header, as one of this one: what it lacks is as after `_init`.
template <class T>
T current(const T* given, T made) {
    const std::size_t size = std::min(given->struct_size, sizeof(T));
    std::memcpy(static_cast<void*>(&made), given, size);
    return made;
}

template <class T>
void initialize(T* to, std::size_t size) {
    if (to == nullptr || size < sizeof(std::size_t)) return;
    std::memset(static_cast<void*>(to), 0, size);
    to->struct_size = size;
}

std::string text_or(const char* text, const char* otherwise) { return text == nullptr ? otherwise : text; }

std::vector<std::string> words_of(const char* text) {
    std::vector<std::string> words;
    std::istringstream stream(text_or(text, ""));
    for (std::string word; stream >> word;) words.push_back(word);
    return words;
}

Progress progress_of(fastnnunet_progress progress, void* user) {
    if (progress == nullptr) return {};
    return [=](std::int64_t done, std::int64_t total) {
        if (progress(user, done, total) != 0) throw Cancelled{};
    };
}

Settings settings_of(const fastnnunet_options& options) {
    Settings settings;
    settings.backend.name = text_or(options.backend, "auto");
    settings.backend.precision = text_or(options.precision, "fp32");
    settings.backend.device = text_or(options.device, "");
    settings.backend.plugins = text_or(options.plugins, "");
    settings.backend.threads = options.threads;
    settings.folds = words_of(options.folds);
    if (options.step_size != 0) settings.step_size = options.step_size;
    settings.mirroring = options.no_mirroring == 0;
    settings.use_gaussian = options.no_gaussian == 0;
    settings.passes = options.passes;
    settings.memory_limit = text_or(options.memory_limit, "");
    settings.locate = options.no_locate == 0;
    return settings;
}

ImageArray image_of(const fastnnunet_image& given, int threads) {
    const std::array<double, 3> spacing{given.spacing_mm[0], given.spacing_mm[1], given.spacing_mm[2]};
    for (const double one : spacing) {
        if (std::isfinite(one) && one > 0) continue;
        throw BadImage("properties['spacing']: got [" + python_real(spacing[0]) + ", " + python_real(spacing[1]) +
                       ", " + python_real(spacing[2]) + "], expected three numbers above 0, mm (z, y, x)");
    }
    double voxels = 1;
    for (const std::int64_t size : given.shape) voxels *= static_cast<double>(size);
    if (*std::min_element(given.shape, given.shape + 4) < 1 || voxels > 1e15) {
        throw Error(FASTNNUNET_BAD_ARGUMENT, "the shape of the image has to be 1 or more along each axis");
    }
    ImageArray image;
    const Index shape{given.shape[1], given.shape[2], given.shape[3]};
    image.voxels = Array4<float>(given.shape[0], shape);
    image.spacing = spacing;
    std::copy(given.voxels, given.voxels + image.voxels.size(), image.voxels.values.get());
    const Volume<const float> all{
        image.voxels.values.get(), {given.shape[0], shape[0] * shape[1], shape[2]}, {voxels_of(shape), shape[2]}};
    const Range range = range_of(all, pass_threads(threads, image.voxels.size()));
    if (!std::isfinite(range.low) || !std::isfinite(range.high)) {
        throw BadImage("the image has NaN or infinite voxels, expected numbers");
    }
    image.previous = given.previous;
    image.previous_shape = shape;
    return image;
}

}  // namespace

extern "C" {

int fastnnunet_api_version(void) { return FASTNNUNET_API_VERSION; }

const char* fastnnunet_version(void) { return FASTNNUNET_VERSION; }

const char* fastnnunet_last_error(void) { return last_error.c_str(); }

void fastnnunet_options_init(fastnnunet_options* options, size_t struct_size) { initialize(options, struct_size); }

void fastnnunet_image_init(fastnnunet_image* image, size_t struct_size) { initialize(image, struct_size); }

void fastnnunet_files_init(fastnnunet_files* files, size_t struct_size) { initialize(files, struct_size); }

void fastnnunet_labels_init(fastnnunet_labels* labels, size_t struct_size) { initialize(labels, struct_size); }

fastnnunet_status fastnnunet_load(const char* bundle, const fastnnunet_options* options, fastnnunet_model** model) {
    if (bundle == nullptr || model == nullptr)
        return failed(FASTNNUNET_BAD_ARGUMENT, "bundle or model is a null pointer");
    *model = nullptr;
    return guarded([&] {
        const Settings settings = options == nullptr ? Settings{} : settings_of(current(options, fastnnunet_options{}));
        *model = new fastnnunet_model(bundle, settings);
    });
}

void fastnnunet_free(fastnnunet_model* model) { delete model; }

const char* fastnnunet_describe(const fastnnunet_model* model) {
    return model == nullptr ? "" : model->description.c_str();
}

fastnnunet_status fastnnunet_predict(const fastnnunet_model* model, const fastnnunet_image* image,
                                     fastnnunet_result** result) {
    if (model == nullptr || image == nullptr || result == nullptr) {
        return failed(FASTNNUNET_BAD_ARGUMENT, "model, image or result is a null pointer");
    }
    *result = nullptr;
    return guarded([&] {
        const fastnnunet_image given = current(image, fastnnunet_image{});
        if (given.voxels == nullptr) throw Error(FASTNNUNET_BAD_ARGUMENT, "the voxels of the image are a null pointer");
        const Progress progress = progress_of(given.progress, given.user);
        ImageArray array = image_of(given, model->model.threads());
        *result = new fastnnunet_result{model->model.predict(std::move(array), progress, given.probabilities != 0)};
    });
}

fastnnunet_status fastnnunet_result_labels(const fastnnunet_result* result, fastnnunet_labels* labels) {
    if (result == nullptr || labels == nullptr) {
        return failed(FASTNNUNET_BAD_ARGUMENT, "result or labels is a null pointer");
    }
    fastnnunet_labels made{};
    std::visit([&](const auto& map) {
        made.voxels = map.values.get();
        made.bytes_per_voxel = static_cast<std::int32_t>(sizeof map.values[0]);
        std::copy(map.shape.begin(), map.shape.end(), made.shape);
    }, result->prediction.labels);
    const Prediction& prediction = result->prediction;
    std::copy(prediction.network_shape.begin(), prediction.network_shape.end(), made.network_shape);
    made.preprocess_s = prediction.times.preprocess_s;
    made.infer_s = prediction.times.infer_s;
    made.postprocess_s = prediction.times.postprocess_s;
    if (prediction.probabilities) {
        made.probabilities = prediction.probabilities->values.get();
        made.heads = prediction.probabilities->count;
    }
    made.struct_size = labels->struct_size;
    std::memcpy(static_cast<void*>(labels), &made, std::min(labels->struct_size, sizeof made));
    return FASTNNUNET_OK;
}

void fastnnunet_result_free(fastnnunet_result* result) { delete result; }

fastnnunet_status fastnnunet_predict_files(const fastnnunet_model* model, const fastnnunet_files* files) {
    if (model == nullptr || files == nullptr)
        return failed(FASTNNUNET_BAD_ARGUMENT, "model or files is a null pointer");
    return guarded([&] {
        const fastnnunet_files given = current(files, fastnnunet_files{});
        if (given.channels == nullptr || given.channel_count < 1 || given.output == nullptr) {
            throw Error(FASTNNUNET_BAD_ARGUMENT, "channels or output of the files is missing");
        }
        const Model& with = model->model;
        check_reader(with.bundle());
        const Cleanup cleanup = parse_cleanup(with.bundle().labels, words_of(given.keep_largest),
                                              text_or(given.min_size, ""), words_of(given.fill_holes),
                                              text_or(given.postprocessing, ""));
        const std::string output = given.output;
        const bool is_seg = output.size() > 4 && output.compare(output.size() - 4, 4, ".dcm") == 0;
        const Outputs outputs(with.bundle(), {is_seg ? "dicom-seg" : "image"}, "binary", "");
        FileCase paths;
        for (std::int32_t i = 0; i < given.channel_count; ++i)
            paths.channels.emplace_back(text_or(given.channels[i], ""));
        paths.previous = text_or(given.previous, "");
        paths.series_uid = text_or(given.series_uid, "");
        paths.name = images::name_of(paths.channels.front());
        LoadedCase loaded = load_case(with, paths, outputs);
        const Progress progress = progress_of(given.progress, given.user);
        Inferred inferred = infer_case(with, loaded, progress, given.save_probabilities != 0);
        finish_case(with, loaded, std::move(inferred), output, outputs, cleanup);
    });
}

// For tests alone: from which size on logits are not kept. Returns what it was.
FASTNNUNET_API int64_t fastnnunet_testing_stream_bytes(int64_t bytes) { return stream_bytes().exchange(bytes); }

// For tests alone: the digest (65 bytes) of `count` bytes, with or without the processor's instructions for it.
FASTNNUNET_API void fastnnunet_testing_sha256(const void* bytes, size_t count, int plainly, char* digest) {
    const std::string text = plainly != 0 ? sha256_hex_plainly(bytes, count) : sha256_hex(bytes, count);
    std::memcpy(digest, text.c_str(), text.size() + 1);
}

}  // extern "C"
