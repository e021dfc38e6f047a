#include "predict/model.hpp"

#include <chrono>

#include "core/half.hpp"
#include "error.hpp"

namespace fastnnunet::engine {
namespace {

// Adds the time until it goes to a stage.
class Stage {
public:
    explicit Stage(double& seconds) : seconds_(seconds), start_(Clock::now()) {}
    ~Stage() { seconds_ += std::chrono::duration<double>(Clock::now() - start_).count(); }
    Stage(const Stage&) = delete;
    Stage& operator=(const Stage&) = delete;

private:
    using Clock = std::chrono::steady_clock;
    double& seconds_;
    Clock::time_point start_;
};

// What a configuration of plans says of a field, itself or through `inherits_from`; null where nothing does.
Json stated(const Json& plans, const std::string& configuration, const char* field) {
    const Json* configurations = plans.find("configurations");
    const Json* config = configurations == nullptr ? nullptr : configurations->find(configuration);
    std::vector<std::string> chain{configuration};
    while (config != nullptr) {
        if (const Json* found = config->find(field)) return *found;
        const Json* base = config->find("inherits_from");
        if (base == nullptr) return {};
        config = base->is(Json::Kind::text) ? configurations->find(base->text()) : nullptr;
        if (config == nullptr) {
            throw CorruptError("inherits_from: got " + base->python() + ", which is no configuration of these plans");
        }
        if (std::find(chain.begin(), chain.end(), base->text()) != chain.end()) {
            chain.push_back(base->text());
            std::string names;
            for (const std::string& name : chain) names += (names.empty() ? "" : ", ") + python_text(name);
            throw CorruptError("inherits_from: [" + names + "] is a circle, expected an end");
        }
        chain.push_back(base->text());
    }
    return {};
}

// Refuses what earlier exports let pass.
void check_names(const Bundle& bundle) {
    const Json* manager = bundle.plans.find("label_manager");
    const Json preprocessor = stated(bundle.plans, bundle.configuration, "preprocessor_name");
    std::string problems;
    const auto check = [&](const char* field, const Json& got, const std::string& expected) {
        if (got.is_null() || got.text() == expected) return;
        problems += std::string("\n  - ") + field + ": got " + got.python() + ", expected " + expected;
    };
    check("preprocessor_name", preprocessor, "DefaultPreprocessor");
    check("label_manager", manager == nullptr ? Json() : *manager, "LabelManager");
    if (problems.empty()) return;
    throw SpecError("the bundle " + bundle.name + " is of a model that this runtime cannot reproduce" + problems +
                    "\npredict with nnU-Net itself, nnUNetv2_predict");
}

// The part of a bundle that consists of these folds.
Bundle with_folds(Bundle bundle, const std::vector<std::string>& folds) {
    if (folds.empty()) return bundle;
    std::vector<std::string> known = bundle.folds;
    if (known.empty()) {
        const Json* fold = bundle.provenance.find("fold");
        known = {fold == nullptr ? "0" : fold->is(Json::Kind::text) ? fold->text() : fold->python()};
    }
    std::string missing, all;
    std::vector<std::string> files;
    for (const std::string& name : known) all += " " + name;
    for (const std::string& fold : folds) {
        const auto found = std::find(known.begin(), known.end(), fold);
        if (found == known.end()) {
            missing += " " + fold;
        } else {
            files.push_back(bundle.model_files[static_cast<std::size_t>(found - known.begin())]);
        }
    }
    if (!missing.empty()) throw SpecError("-f" + missing + ": the bundle " + bundle.name + " has fold(s)" + all);
    bundle.folds = folds;
    bundle.model_files = files;
    return bundle;
}

Tiles tiles_of(const Bundle& bundle, const Settings& settings) {
    return {bundle.channels(), bundle.num_heads, bundle.patch_size,
            settings.mirroring ? bundle.mirror_axes : std::vector<int>{}};
}

std::unique_ptr<Way> choose_way(const Bundle& bundle, const Settings& settings, const Network& network) {
    const Tiles tiles = tiles_of(bundle, settings);
    if (bundle.one_pass && !settings.step_size) {
        OnePassSettings given;
        given.passes = settings.passes == 0 ? 1 : settings.passes;
        given.memory_limit = settings.memory_limit.empty() ? 0 : parse_memory(settings.memory_limit);
        given.overhead = network.overhead();
        given.largest_tile = network.largest_tile();
        return one_pass(tiles, *bundle.one_pass, given);
    }
    if (settings.passes != 0 || !settings.memory_limit.empty()) {
        const std::string given = settings.passes != 0 ? "passes" : "memory limit";
        throw SpecError(
            given + ": nnU-Net's window has none, " +
            (bundle.one_pass ? "and a step size asks for it" : "and the bundle " + bundle.name + " has no other way") +
            "\nleave out the " + (bundle.one_pass ? "step size" : given));
    }
    const double step_size = settings.step_size.value_or(bundle.step_size);
    if (settings.step_size && !(step_size > 0 && step_size <= 1)) {
        throw SpecError("step_size: got " + python_real(step_size) + ", expected a number in (0, 1]");
    }
    return sliding_window(tiles, step_size, settings.use_gaussian);
}

// Its network in float32, as its margin was measured, on the backend of the bundle; on the CPU where that needs built
// engines.
Locating load_locator(const Bundle& bundle, BackendChoice choice, const std::string& backend) {
    const Bundle own = of_locator(bundle);
    choice.precision = "fp32";
    choice.name = backend;
    if (backend == "tensorrt") {
        choice.name = "auto";
        choice.device.clear();
    }
    Locating made{*bundle.locator, bundle.spacing_mm, tiles_of(own, {}), nullptr, nullptr};
    made.network = std::move(load_networks(own, choice).front());
    made.way = choose_way(own, Settings{}, *made.network);
    return made;
}

}  // namespace

std::atomic<std::int64_t>& stream_bytes() {
    static std::atomic<std::int64_t> bytes{std::int64_t{1} << 29};
    return bytes;
}

Model::Model(const std::string& folder, const Settings& settings, bool wait)
    : bundle_(with_folds(load_bundle(folder), settings.folds)), threads_(settings.backend.threads),
      mirroring_(settings.mirroring), locate_(settings.locate),
      may_be_on_gpu_(settings.backend.name == "tensorrt" || settings.backend.device.rfind("cuda", 0) == 0),
      tiles_(tiles_of(bundle_, settings)) {
    if (threads_ < 0) throw SpecError("threads: got " + std::to_string(threads_) + ", expected at least 1");
    check_names(bundle_);
    check_normalization(bundle_);
    resample_data_ = parse_resampling(*bundle_.resampling.find("data"), "the image");
    resample_logits_ = parse_resampling(*bundle_.resampling.find("probabilities"), "the logits");
    if (!bundle_.previous_labels.empty()) {
        resample_labels_ = parse_label_resampling(*bundle_.resampling.find("seg"), "the previous segmentation");
    }
    rule_ = label_rule(bundle_);
    background_ = background_logits(bundle_.num_heads, rule_.regions.has_value());
    const auto start = std::chrono::steady_clock::now();
    const auto load = [this, settings, start]() -> std::shared_ptr<const Ready> {
        auto made = std::make_shared<Ready>();
        made->networks = load_networks(bundle_, settings.backend);
        made->way = choose_way(bundle_, settings, *made->networks.front());
        if (bundle_.locator && locate_) {
            made->locating = load_locator(bundle_, settings.backend, made->networks.front()->name());
        }
        std::string& reason = made->stays_on_cpu;
        made->on_gpu = device_stages(bundle_, tiles_, rule_, made->networks, settings.backend.plugins, reason);
        if (!reason.empty()) reason = "what comes before and after the network stays on the CPU: " + reason;
        if (made->on_gpu && !made->on_gpu->can_preprocess()) {
            reason = std::string("preprocessing stays on the CPU: the model ") +
                     (bundle_.previous_labels.empty() ? "normalises inside a mask" : "is a cascade stage");
        }
        made->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        return made;
    };
    loading_ = std::async(wait ? std::launch::deferred : std::launch::async, load).share();
    if (wait) ready();
}

Case Model::preprocess(ImageArray image) const {
    const DeviceStages* on_gpu = stages();
    if (on_gpu != nullptr && on_gpu->can_preprocess()) return on_gpu->preprocess(image, preprocessing());
    Case made = engine::preprocess(std::move(image), preprocessing());
    return on_gpu == nullptr ? made : on_gpu->upload(std::move(made));
}

// nnU-Net adds the float16 logits of a fold to the sum of those before it and divides the sum, rounding to float16
// after each step; so the order of the folds counts.
Array4<Half> Model::logits(const Case& from, const Way& way, const Progress& progress) const {
    const auto& networks = ready().networks;
    const auto folds = static_cast<std::int64_t>(networks.size());
    const auto share = [&](std::int64_t number) -> Progress {
        if (!progress) return {};
        return [&progress, number, folds](std::int64_t done, std::int64_t total) {
            progress(number * total + done, folds * total);
        };
    };
    const Index& shape = from.data.shape;
    HostArithmetic arithmetic(threads_);
    HostTiles of_first(*networks[0], tiles_, from.data.read(), threads_);
    Array4<Half> total = one_piece(way, shape, {of_first, arithmetic, share(0)});
    for (std::int64_t number = 1; number < folds; ++number) {
        HostTiles tiles(*networks[number], tiles_, from.data.read(), threads_);
        const std::unique_ptr<Pass> pass = way.begin(shape, false);
        pass->run({tiles, arithmetic, share(number)}, 0, [&](const Index& chunk, Array4<Half> logits) {
            arithmetic.add_halves(logits.read(), part(total.view(), pass->chunks().box(chunk)));
        });
    }
    if (folds > 1) arithmetic.divide(total.view(), folds, "the sum of the folds' logits");
    return total;
}

LabelMap Model::stream(const Case& from, const std::optional<ResamplePlan>& how, const Way& way, StageTimes& times,
                       const Progress& progress) const {
    LabelMap labels = new_labels(rule_, from.shape_before_cropping);
    const std::unique_ptr<Pass> pass = way.begin(from.data.shape, false);
    HostLabels written(how, rule_, view_of(labels, from.crop), threads_);
    LabelStream stream(pass->chunks(), how, written);
    HostTiles tiles(network(), tiles_, from.data.read(), threads_);
    HostArithmetic arithmetic(threads_);
    double labelling = 0, all = 0;
    {
        const Stage stage(all);
        pass->run({tiles, arithmetic, progress}, LabelStream::kMargin, [&](const Index& number, Array4<Half> logits) {
            const Stage of_chunk(labelling);
            stream.add(number, std::move(logits));
        });
    }
    times.infer_s += all - labelling;
    times.postprocess_s += labelling;
    return labels;
}

Inferred Model::infer(const Case& from, StageTimes& times, const Progress& progress, bool probabilities) const {
    const Ready& loaded = ready();
    const Index& shape = from.data.shape;
    const std::optional<ResamplePlan> how =
        plan(resample_logits_, shape, from.cropped_shape(), from.target, from.spacing);
    std::unique_ptr<Way> in_box;
    if (loaded.locating) {
        const Stage stage(times.infer_s);
        const Array4<float> data = from.stream ? loaded.on_gpu->fetch(from) : from.data;
        in_box = located(*loaded.locating, data.read(), *loaded.way, background_, threads_);
    }
    const Way& way = in_box ? *in_box : *loaded.way;
    const bool is_local = !how || how->is_local();
    if (from.stream && !probabilities) {
        const Stage stage(times.infer_s);
        return in_memory(way, shape, [&](const Way& one) -> Inferred {
            return {{}, std::nullopt, loaded.on_gpu->infer(from, one, how, progress, stream_bytes())};
        });
    }
    const bool is_kept = 2 * bundle_.num_heads * voxels_of(shape) <= stream_bytes();
    if (!probabilities && loaded.networks.size() == 1 && is_local && !is_kept) {
        return in_memory(way, shape, [&](const Way& one) -> Inferred {
            return {stream(from, how, one, times, progress), std::nullopt, {}};
        });
    }
    Array4<Half> all;
    {
        const Stage stage(times.infer_s);
        all = in_memory(way, shape, [&](const Way& one) {
            return from.stream ? loaded.on_gpu->logits(from, one, progress) : logits(from, one, progress);
        });
    }
    const Stage stage(times.postprocess_s);
    Inferred made{new_labels(rule_, from.shape_before_cropping), std::nullopt, {}};
    const LabelView crop = view_of(made.labels, from.crop);
    if (probabilities) {
        made.probabilities = new_probabilities(rule_, from.shape_before_cropping);
        label_probabilities(all.read(), how, rule_, crop, part(made.probabilities->view(), from.crop), threads_);
    } else {
        label_whole(all.read(), how, rule_, crop, threads_);
    }
    return made;
}

LabelMap Model::labels_in_image(Inferred& inferred) const {
    if (inferred.fetch) return inferred.fetch();
    return to_image(std::move(inferred.labels), bundle_.transpose_backward, threads_);
}

Prediction Model::predict(ImageArray image, const Progress& progress, bool probabilities) const {
    Prediction made;
    Case from;
    {
        const Stage stage(made.times.preprocess_s);
        from = preprocess(std::move(image));
    }
    made.network_shape = {from.data.count, from.data.shape[0], from.data.shape[1], from.data.shape[2]};
    Inferred inferred = infer(from, made.times, progress, probabilities);
    const Stage stage(made.times.postprocess_s);
    made.labels = labels_in_image(inferred);
    if (inferred.probabilities) {
        made.probabilities = to_image(std::move(*inferred.probabilities), bundle_.transpose_backward, threads_);
    }
    return made;
}

std::string Model::describe() const {
    std::string folds, axes;
    for (const std::string& fold : bundle_.folds) folds += (folds.empty() ? "" : ", ") + json_text(fold);
    for (const int axis : mirroring_ ? bundle_.mirror_axes : std::vector<int>{}) {
        axes += (axes.empty() ? "" : ", ") + std::to_string(axis);
    }
    const std::string locate = bundle_.locator ? std::string(", \"locate\": ") + (locate_ ? "true" : "false") : "";
    std::string stages;
    if (network().gpu()) stages = std::string(", \"stages\": \"") + (ready().on_gpu ? "cuda" : "cpu") + "\"";
    return "{\"bundle\": " + json_text(bundle_.name) + ", \"folds\": [" + folds +
           "], \"backend\": " + json_text(network().name()) + ", \"precision\": " + json_text(network().precision()) +
           ", \"library\": " + json_text(network().library()) + ", \"mirror_axes\": [" + axes + "], " +
           ready().way->describe() + locate + stages + "}";
}

}  // namespace fastnnunet::engine
