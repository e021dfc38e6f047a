// From the logits of all heads to labels, without the resampled logits of all heads ever being in memory.
//
// float32 arithmetic: it is off by 1e-7 of a logit where nnU-Net then rounds to float16, 4000 times coarser. A voxel can
// only differ where a value lies that close to the middle of two float16 numbers and two heads are one of them apart.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/axis_operator.hpp"
#include "core/resample.hpp"
#include "core/view.hpp"

namespace fastnnunet {

// How logits are resampled (operators of order 0 or 1), and whether they are then rounded to float16
struct LogitPlan {
    AxisOperators operators;
    bool to_half;
};

// Where arrays that hold a part of the logits and of the labels, in whole rows, lie in the whole: their first z and y
struct Part {
    std::array<std::int64_t, 2> first_in{0, 0};
    std::array<std::int64_t, 2> first_out{0, 0};
};

// Without `regions`: the head with the largest logit, ties to the lowest. With `regions`, one label per head: in the
// order of heads, label where sigmoid(logit) in float32 is above 0.5, else what was painted before, else 0.
// Logit: float or Half; Label: uint8 or uint16. Operators are those of the whole; a label does not depend on the part it
// is in. Throws std::invalid_argument for shapes and operators that do not fit, and for a part without an input it needs.
template <class Logit, class Label>
void label_logits(const Volumes<const Logit>& logits, const Volume<Label>& labels, const LogitPlan& plan,
                  const Part& part, const std::optional<std::vector<std::uint32_t>>& regions, int threads);

// The resampled logits of all heads for the output planes from `first_plane` on, as many as `out` has.
template <class Logit>
void resample_planes(const Volumes<const Logit>& logits, const Volumes<float>& out, const LogitPlan& plan,
                     std::int64_t first_plane, int threads);

// The same one head at a time, for logits resampled by other means: keeps the largest value so far in `best`, which
// starts at -infinity, and its head in `labels`.
template <class Label>
void label_head(const Volume<const float>& values, bool to_half, std::uint32_t head, const Volume<float>& best,
                const Volume<Label>& labels, int threads);

template <class Label>
void paint_head(const Volume<const float>& values, bool to_half, std::uint32_t label, const Volume<Label>& labels,
                int threads);

}  // namespace fastnnunet
