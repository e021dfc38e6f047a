// A backend for the tests of the way over a GPU: a network whose logits at a voxel depend on the voxel and its six
// neighbours, on every side by another weight, drawn from the digest of its model file. On the emulated GPU it is work on
// a stream; `run` computes the same on the CPU.
//
// FASTNNUNET_EMULATED_MOST     patches in a batch; 3
// FASTNNUNET_EMULATED_VOXELS   of the largest tile that it finds memory for; any
#include <cmath>
#include <cstdlib>
#include <list>
#include <mutex>
#include <string>
#include <vector>

#include "backends/library.hpp"

using namespace fastnnunet::engine;

namespace {

constexpr int kNeighbours = 7;

struct Network {
    std::int64_t channels, heads;
    std::int32_t dims, gpu;
    std::vector<float> weights;  // (heads, channels, kNeighbours)

    explicit Network(const fastnnunet_network_spec& spec)
        : channels(spec.channels), heads(spec.heads), dims(spec.dims),
          gpu(std::string(spec.device) == "cpu" ? -1 : 0),
          weights(static_cast<std::size_t>(channels * heads * kNeighbours)) {
        std::uint64_t state = std::strtoull(std::string(spec.file_digest).substr(0, 15).c_str(), nullptr, 16);
        for (float& weight : weights) {  // from -1 to 1
            state = state * 6364136223846793005u + 1442695040888963407u;
            weight = static_cast<float>(state >> 40) / static_cast<float>(1 << 23) - 1;
        }
    }

    void compute(const float* batch, std::int64_t count, const std::int64_t* tile, float* logits) const {
        std::int64_t size[3] = {1, 1, 1};
        for (int axis = 0; axis < dims; ++axis) size[3 - dims + axis] = tile[axis];
        const std::int64_t voxels = size[0] * size[1] * size[2];
        for (std::int64_t i = 0; i < count * channels * voxels; ++i) {
            if (std::isfinite(batch[i])) continue;
            std::fprintf(stderr, "emulated network: it ran before its batch was there\n");
            std::abort();
        }
        const std::int64_t steps[3] = {size[1] * size[2], size[2], 1};
        for (std::int64_t n = 0; n < count; ++n) {
            for (std::int64_t head = 0; head < heads; ++head) {
                for (std::int64_t i = 0; i < voxels; ++i) {
                    const std::int64_t at[3] = {i / steps[0], i / steps[1] % size[1], i % size[2]};
                    float sum = 0;
                    for (std::int64_t channel = 0; channel < channels; ++channel) {
                        const float* values = batch + (n * channels + channel) * voxels;
                        const float* weight = weights.data() + (head * channels + channel) * kNeighbours;
                        sum += weight[0] * values[i];
                        for (int axis = 0; axis < 3; ++axis) {
                            if (at[axis] > 0) sum += weight[1 + 2 * axis] * values[i - steps[axis]];
                            if (at[axis] + 1 < size[axis]) sum += weight[2 + 2 * axis] * values[i + steps[axis]];
                        }
                    }
                    logits[(n * heads + head) * voxels + i] = sum;
                }
            }
        }
    }

    void check_memory(const std::int64_t* tile) const {
        std::int64_t voxels = 1;
        for (int axis = 0; axis < dims; ++axis) voxels *= tile[axis];
        const char* most = std::getenv("FASTNNUNET_EMULATED_VOXELS");
        if (most != nullptr && voxels > std::atoll(most)) throw std::runtime_error("out of memory");
    }

    // What a stream, or a graph, has still to do
    struct Work {
        const Network* network;
        const float* batch;
        std::int64_t count, tile[3];
        float* logits;
    };
    std::mutex turn;
    std::list<Work> works;
};

Network* of(fastnnunet_network* network) { return reinterpret_cast<Network*>(network); }
const Network* of(const fastnnunet_network* network) { return reinterpret_cast<const Network*>(network); }

std::int32_t load(const fastnnunet_network_spec* spec, fastnnunet_network** network, fastnnunet_failure* failure) {
    return guarded(failure, [&] { *network = reinterpret_cast<fastnnunet_network*>(new Network(*spec)); });
}

std::int32_t run(fastnnunet_network* network, const float* batch, std::int64_t count, const std::int64_t* tile,
                 float* logits, fastnnunet_failure* failure) {
    return guarded(failure, [&] {
        of(network)->check_memory(tile);
        of(network)->compute(batch, count, tile, logits);
    });
}

std::int64_t most_on_gpu(const fastnnunet_network*) {
    const char* most = std::getenv("FASTNNUNET_EMULATED_MOST");
    return most == nullptr ? 3 : std::atoll(most);
}

std::int32_t run_on_gpu(fastnnunet_network* network, const float* batch, std::int64_t count, const std::int64_t* tile,
                        float* logits, void* stream, fastnnunet_failure* failure) {
    return guarded(failure, [&] {
        static int (*launch)(void*, void (*)(void*), void*) = nullptr;
        if (launch == nullptr) look_up(dlopen("libcuda.so.1", RTLD_NOW), "cuLaunchHostFunc", launch);
        Network& one = *of(network);
        one.check_memory(tile);
        if (count > most_on_gpu(network)) throw std::runtime_error("more patches than a batch has");
        const std::lock_guard lock(one.turn);
        Network::Work& work = one.works.emplace_back(Network::Work{&one, batch, count, {}, logits});
        std::copy(tile, tile + one.dims, work.tile);
        const auto compute = [](void* data) {
            const auto& of_stream = *static_cast<const Network::Work*>(data);
            of_stream.network->compute(of_stream.batch, of_stream.count, of_stream.tile, of_stream.logits);
        };
        if (launch(stream, compute, &work) != 0) throw std::runtime_error("cuLaunchHostFunc failed");
    });
}

const fastnnunet_backend kBackend{
    FASTNNUNET_BACKEND_INTERFACE,
    "tensorrt",
    "fp32",
    "cuda cpu",
    [](fastnnunet_failure*) -> std::int32_t { return 0; },
    load,
    run,
    [](fastnnunet_network* network) { delete of(network); },
    [](const fastnnunet_network*) { return 1.0; },
    [](const fastnnunet_network*, std::int64_t*) -> std::int32_t { return 0; },
    [](const fastnnunet_network*) { return "fp32"; },
    [](const fastnnunet_network*) { return "emulated"; },
    [](const fastnnunet_network* network) { return of(network)->gpu; },
    most_on_gpu,
    [](const fastnnunet_network*) -> std::int32_t { return 1; },
    run_on_gpu,
};

}  // namespace

extern "C" FASTNNUNET_PLUGIN const fastnnunet_backend* fastnnunet_backend_entry_1(void) { return &kBackend; }
