// The network of the emulated GPU: logits at a voxel depend on the voxel and its six neighbours, on every side by
// another weight, which are drawn from the digest of a model file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "backends/library.hpp"

namespace fastnnunet::emulation {

class Stencil {
public:
    Stencil(std::int64_t channels, std::int64_t heads, std::int32_t dims, const std::string& digest)
        : channels_(channels), heads_(heads), dims_(dims),
          weights_(static_cast<std::size_t>(channels * heads * kNeighbours)) {
        std::uint64_t state = std::strtoull(digest.substr(0, 15).c_str(), nullptr, 16);
        for (float& weight : weights_) {  // from -1 to 1
            state = state * 6364136223846793005u + 1442695040888963407u;
            weight = static_cast<float>(state >> 40) / static_cast<float>(1 << 23) - 1;
        }
    }

    // Logits (count, heads, tile) of a batch (count, channels, tile), which ends the process where it is not finite.
    void compute(const float* batch, std::int64_t count, const std::int64_t* tile, float* logits) const {
        std::int64_t size[3] = {1, 1, 1};
        for (int axis = 0; axis < dims_; ++axis) size[3 - dims_ + axis] = tile[axis];
        const std::int64_t voxels = size[0] * size[1] * size[2];
        for (std::int64_t i = 0; i < count * channels_ * voxels; ++i) {
            if (std::isfinite(batch[i])) continue;
            std::fprintf(stderr, "emulated network: it ran before its batch was there\n");
            std::abort();
        }
        const std::int64_t steps[3] = {size[1] * size[2], size[2], 1};
        for (std::int64_t n = 0; n < count; ++n) {
            for (std::int64_t head = 0; head < heads_; ++head) {
                for (std::int64_t i = 0; i < voxels; ++i) {
                    const std::int64_t at[3] = {i / steps[0], i / steps[1] % size[1], i % size[2]};
                    float sum = 0;
                    for (std::int64_t channel = 0; channel < channels_; ++channel) {
                        const float* values = batch + (n * channels_ + channel) * voxels;
                        const float* weight = weights_.data() + (head * channels_ + channel) * kNeighbours;
                        sum += weight[0] * values[i];
                        for (int axis = 0; axis < 3; ++axis) {
                            if (at[axis] > 0) sum += weight[1 + 2 * axis] * values[i - steps[axis]];
                            if (at[axis] + 1 < size[axis]) sum += weight[2 + 2 * axis] * values[i + steps[axis]];
                        }
                    }
                    logits[(n * heads_ + head) * voxels + i] = sum;
                }
            }
        }
    }

    // The same as work on a stream of the emulated driver.
    void put(const float* batch, std::int64_t count, const std::int64_t* tile, float* logits, void* stream) {
        static int (*launch)(void*, void (*)(void*), void*) = nullptr;
        if (launch == nullptr) engine::look_up(dlopen("libcuda.so.1", RTLD_NOW), "cuLaunchHostFunc", launch);
        const std::lock_guard lock(turn_);
        Work& work = works_.emplace_back(Work{this, batch, count, {}, logits});
        std::copy(tile, tile + dims_, work.tile);
        const auto compute = [](void* data) {
            const auto& work = *static_cast<const Work*>(data);
            work.network->compute(work.batch, work.count, work.tile, work.logits);
        };
        if (launch(stream, compute, &work) != 0) throw std::runtime_error("cuLaunchHostFunc failed");
    }

private:
    static constexpr int kNeighbours = 7;

    struct Work {  // what a stream, or a graph, has still to do: kept as long as the network
        const Stencil* network;
        const float* batch;
        std::int64_t count, tile[3];
        float* logits;
    };

    std::int64_t channels_, heads_;
    std::int32_t dims_;
    std::vector<float> weights_;  // (heads, channels, kNeighbours)
    std::mutex turn_;
    std::list<Work> works_;
};

}  // namespace fastnnunet::emulation
