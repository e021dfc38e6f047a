// A bundle in memory: what fastnnunet/runtime/loaded.py is to Python.
#pragma once

#include <atomic>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backends/plugins.hpp"
#include "bundle/bundle.hpp"
#include "device/stages.hpp"
#include "predict/labels.hpp"
#include "predict/locate.hpp"
#include "predict/preprocess.hpp"
#include "predict/ways.hpp"

namespace fastnnunet::engine {

struct Settings {
    BackendChoice backend;
    std::vector<std::string> folds;  // empty: all
    std::optional<double> step_size;  // of the window; none: the bundle's, or one pass
    bool mirroring = true;
    bool use_gaussian = true;
    std::int64_t passes = 0;   // of one pass; 0: 1
    std::string memory_limit;  // of one pass
    bool locate = true;        // in the box that the bundle's locator finds, where it has one
};

struct StageTimes {
    double read_s = 0, preprocess_s = 0, infer_s = 0, postprocess_s = 0, write_s = 0;
};

// What an image's logits become, in the model's axes, of the image's shape before it was cropped.
struct Inferred {
    LabelMap labels;
    std::optional<Array4<float>> probabilities;  // of the heads, where they are wanted
    FetchLabels fetch;                           // the labels are still on a GPU, in the axes of the image
};

struct Prediction {
    LabelMap labels;  // in the axes of the image
    std::optional<Array4<float>> probabilities;
    std::array<std::int64_t, 4> network_shape{};
    StageTimes times;
};

// Any number of threads may predict at once; each gets what it would get alone.
class Model {
public:
    // Checks the bundle and loads its networks; `wait` false: in another thread, and they are waited for when they are
    // used first, which then throws what loading them threw. Throws Error.
    Model(const std::string& folder, const Settings& settings, bool wait = true);

    const Bundle& bundle() const { return bundle_; }
    const Network& network() const { return *ready().networks.front(); }
    double load_s() const { return ready().seconds; }  // that loading took

    // What the network sees of an image, which is used up.
    Case preprocess(ImageArray image) const;
    Inferred infer(const Case& from, StageTimes& times, const Progress& progress, bool probabilities = false) const;
    // In the axes of the image. Throws BackendError where they are fetched from a GPU that failed.
    LabelMap labels_in_image(Inferred& inferred) const;
    Prediction predict(ImageArray image, const Progress& progress, bool probabilities = false) const;

    std::string describe() const;  // a JSON object
    // What of the work stays on the CPU though the network is on a GPU, and why; empty: nothing
    const std::string& stays_on_cpu() const { return ready().stays_on_cpu; }
    int threads() const { return threads_; }

private:
    struct Ready {
        std::vector<std::unique_ptr<Network>> networks;
        std::unique_ptr<Way> way;
        std::optional<Locating> locating;
        std::unique_ptr<DeviceStages> on_gpu;
        std::string stays_on_cpu;
        double seconds;
    };

    const Ready& ready() const { return *loading_.get(); }
    const DeviceStages* stages() const { return may_be_on_gpu_ ? ready().on_gpu.get() : nullptr; }
    Preprocessing preprocessing() const { return {bundle_, resample_data_, resample_labels_, threads_}; }
    Array4<Half> logits(const Case& from, const Way& way, const Progress& progress) const;
    LabelMap stream(const Case& from, const std::optional<ResamplePlan>& how, const Way& way, StageTimes& times,
                    const Progress& progress) const;

    Bundle bundle_;
    int threads_;
    bool mirroring_, locate_, may_be_on_gpu_;
    Tiles tiles_;
    Resampling resample_data_, resample_logits_, resample_labels_;
    LabelRule rule_;
    std::vector<Half> background_;  // outside the box
    std::shared_future<std::shared_ptr<const Ready>> loading_;
};

// Logits of more bytes are not kept but labelled while the window goes on. Of this process; for tests.
std::atomic<std::int64_t>& stream_bytes();

}  // namespace fastnnunet::engine
