// Opening the plugins that run networks, and choosing among them.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backends/backend.h"
#include "bundle/bundle.hpp"

namespace fastnnunet::engine {

struct BackendChoice {
    std::string name = "auto";  // the fastest there is
    std::string precision = "fp32";
    std::string device;   // empty: where the backend computes
    std::string plugins;  // their folder; empty: beside this library
    int threads = 0;      // 0: all cores
};

// Logits that lie where a network has put them
using KeptLogits = std::unique_ptr<const float, std::function<void(const float*)>>;

// A network of one model file. `run` may be called from several threads at once.
class Network {
public:
    Network(const fastnnunet_backend& backend, fastnnunet_network* network, const Bundle& bundle);
    ~Network();
    Network(const Network&) = delete;
    Network& operator=(const Network&) = delete;

    // Logits (count, heads, tile) of a contiguous batch (count, channels, tile). Throws BackendError.
    void run(const float* batch, std::int64_t count, const Sizes& tile, float* logits) const;
    // The same without a copy; none where the network has no place of its own for them. They outlive no network.
    KeptLogits run_in_place(const float* batch, std::int64_t count, const Sizes& tile) const;

    std::string name() const { return backend_.name; }
    std::string precision() const { return backend_.precision(network_); }
    std::string library() const { return backend_.library(network_); }
    double overhead() const { return backend_.overhead(network_); }
    Sizes largest_tile() const;  // empty: any

    // For callers whose batches lie on the GPU of the network.
    std::optional<int> gpu() const;  // none: it computes on the CPU
    std::int64_t most_on_gpu() const { return backend_.most_on_gpu(network_); }  // patches in a batch
    bool can_capture() const { return backend_.can_capture(network_) != 0; }     // from the second run of a shape on
    // Puts the network on a CUDA stream, for a batch and logits that lie on the GPU. Throws BackendError.
    void run_on_gpu(const float* batch, std::int64_t count, const Sizes& tile, float* logits, void* stream) const;

private:
    void run_exactly(const float* batch, std::int64_t count, const Sizes& tile, float* logits) const;
    [[noreturn]] void fail(const fastnnunet_failure& failure, std::int64_t count, const Sizes& tile) const;

    const fastnnunet_backend& backend_;
    fastnnunet_network* network_;
    std::int64_t channels_, heads_, batch_size_;
    std::size_t dims_;
};

// One network for each model file of a bundle, all of one kind. Throws SpecError for an unknown name, BackendError when
// a plugin or what it needs is missing, or it cannot load the model.
std::vector<std::unique_ptr<Network>> load_networks(const Bundle& bundle, const BackendChoice& choice);

// Where plugins, and what lies beside them, are looked for; `given`: there alone, if it is not empty.
std::vector<std::string> plugin_folders(const std::string& given);

// For each backend its name and "" where it can be used, else what to install.
std::vector<std::pair<std::string, std::string>> list_backends(const std::string& plugins);

}  // namespace fastnnunet::engine
