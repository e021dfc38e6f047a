// Every kernel by name: FNN_KERNEL(body, its parameters, bytes of shared memory that a block needs)
#pragma once

#include "label.hpp"
#include "normalize.hpp"
#include "resample.hpp"
#include "window.hpp"

namespace fastnnunet::cuda {

constexpr int kSharedLimits = kBlockThreads * sizeof(Limits);
constexpr int kSharedExtent = kBlockThreads * sizeof(Extent);
constexpr int kSharedLeaves = kBlockThreads * sizeof(float);
constexpr int kSharedSums = (1 << kMostLevels) * sizeof(float);

}  // namespace fastnnunet::cuda

#define FNN_KERNELS(FNN_KERNEL)                              \
    FNN_KERNEL(gather, GatherParams, 0)                      \
    FNN_KERNEL(add_mirrored, MirrorParams, 0)                \
    FNN_KERNEL(add_weighted, AddParams, 0)                   \
    FNN_KERNEL(add_halves, AddHalvesParams, 0)               \
    FNN_KERNEL(divide, DivideParams, kSharedLimits)          \
    FNN_KERNEL(copy_halves, CopyParams, 0)                   \
    FNN_KERNEL(nonzero_box, BoxParams, kSharedExtent)        \
    FNN_KERNEL(find_limits, LimitsParams, kSharedLimits)     \
    FNN_KERNEL(fill_limits, FillParams, 0)                   \
    FNN_KERNEL(pairwise_leaves, LeavesParams, kSharedLeaves) \
    FNN_KERNEL(pairwise_combine, CombineSumsParams, kSharedSums) \
    FNN_KERNEL(finish_moments, FinishParams, 0)              \
    FNN_KERNEL(scale, ScaleParams, 0)                        \
    FNN_KERNEL(load_lines, LoadParams, 0)                    \
    FNN_KERNEL(prefilter, PrefilterParams, 0)                \
    FNN_KERNEL(combine_lines, CombineParams, 0)              \
    FNN_KERNEL(label_logits, LabelParams, 0)                 \
    FNN_KERNEL(label_head, HeadParams, 0)
