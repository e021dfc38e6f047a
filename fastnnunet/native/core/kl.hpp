// The soft loss of exclusive classes with its derivative, in one pass over the voxels.
#pragma once

#include <cstdint>

namespace fastnnunet {

// (samples, channels, voxels) with strides in elements.
template <class T>
struct Samples {
    T* data;
    std::int64_t samples, channels, voxels;
    std::int64_t stride_sample, stride_channel, stride_voxel;
};

struct KLSum {
    double sum;  // of KL over the voxels that count
    std::int64_t voxels;  // that count
};

// KL(p || q) with q = softmax(logits / temperature) and p = soft, under whose channels the first, 1 - their sum (not
// below 0), is left out. `difference`, of the shape of `logits`, becomes q - p, which is T times the derivative by the
// logits; 0 where `mask` (samples, voxels; may be null) is 0. No result depends on the number of threads.
KLSum kl_classes(const Samples<const float>& logits, const Samples<const float>& soft, const std::uint8_t* mask,
                 float temperature, const Samples<float>& difference, int threads);

}  // namespace fastnnunet
