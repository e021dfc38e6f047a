// From logits to probabilities, in place: nnU-Net's softmax over the heads, or a sigmoid of each (regions).
//
// The exponential is of this file: within half a unit in the last place of float32, and the same on every processor, so
// that programs in Python and in C++ write the same files.
#pragma once

#include "core/view.hpp"

namespace fastnnunet {

// exp(logit - largest) / sum, heads summed in their order in float32
void softmax_heads(const Volumes<float>& logits, int threads);

// 1 / (1 + exp(-logit))
void sigmoid_heads(const Volumes<float>& logits, int threads);

}  // namespace fastnnunet
