// A backend for the tests of the way over a GPU: the network of stencil.hpp. On the emulated GPU it is work on a stream;
// `run` computes the same on the CPU.
//
// FASTNNUNET_EMULATED_MOST     patches in a batch; 3
// FASTNNUNET_EMULATED_VOXELS   of the largest tile that it finds memory for; any
#include "stencil.hpp"

using namespace fastnnunet::engine;
using fastnnunet::emulation::Stencil;

namespace {

std::int64_t number_of(const char* variable, std::int64_t otherwise) {
    const char* text = std::getenv(variable);
    return text == nullptr ? otherwise : std::atoll(text);
}

struct Network {
    explicit Network(const fastnnunet_network_spec& spec)
        : dims(spec.dims), gpu(std::string(spec.device) == "cpu" ? -1 : 0),
          stencil(spec.channels, spec.heads, spec.dims, spec.file_digest) {}

    void check_memory(const std::int64_t* tile) const {
        std::int64_t voxels = 1;
        for (int axis = 0; axis < dims; ++axis) voxels *= tile[axis];
        if (voxels > number_of("FASTNNUNET_EMULATED_VOXELS", voxels)) throw std::runtime_error("out of memory");
    }

    std::int32_t dims, gpu;
    Stencil stencil;
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
        of(network)->stencil.compute(batch, count, tile, logits);
    });
}

std::int64_t most_on_gpu(const fastnnunet_network*) { return number_of("FASTNNUNET_EMULATED_MOST", 3); }

std::int32_t run_on_gpu(fastnnunet_network* network, const float* batch, std::int64_t count, const std::int64_t* tile,
                        float* logits, void* stream, fastnnunet_failure* failure) {
    return guarded(failure, [&] {
        of(network)->check_memory(tile);
        if (count > most_on_gpu(network)) throw std::runtime_error("more patches than a batch has");
        of(network)->stencil.put(batch, count, tile, logits, stream);
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
