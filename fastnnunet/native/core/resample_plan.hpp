// What to resample how: nnU-Net's resampling functions in terms of one operator per axis.
//
// Spacings are in mm, axes z, y, x in nnU-Net's internal order (after transpose_forward).
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "core/axis_operator.hpp"
#include "core/resample.hpp"
#include "core/view.hpp"

namespace fastnnunet {

using Spacing = std::array<double, 3>;

// One of nnU-Net's functions with its arguments. scipy is resample_data_or_seg_to_shape: scikit-image's
// resize(mode="edge", anti_aliasing=False) in float64, clipped to the input's range; slice by slice, and with order_z
// between slices, where the spacing is anisotropic. torch is resample_torch_fornnunet: `interpolate` with order 1.
struct ResampleSpec {
    Convention convention = Convention::scipy;
    int order = 3;
    int order_z = 0;
    std::optional<bool> force_separate_z;  // none: where the spacing is anisotropic
    double anisotropy_threshold = 3;
};

// What one pair of shapes needs along each axis.
struct ResamplePlan {
    Convention convention;
    std::array<int, 3> orders;         // 0 where an axis keeps its size
    std::optional<int> separate_axis;  // planes across it are resampled each by itself, then along it
    Clip clip;
    Index shape_out;

    // Every output value depends on at most two samples per axis, so it can be made wherever it is needed.
    bool is_local() const;
    // The result is cast back to the type of the input (float16 for logits); torch's variant returns float32.
    bool keeps_type() const { return convention == Convention::scipy; }
    AxisOperators operators(const Index& shape_in) const;
};

// Shape after resampling to the target spacing, rounded half to even; sizes of 2^53 and above are 2^53.
// Throws std::invalid_argument where it is not a number.
Index resampled_shape(const Index& shape, const Spacing& spacing, const Spacing& target);

// The axis to be treated separately. The present spacing is looked at first, then the target; two or three equally
// coarse axes mean none.
std::optional<int> coarse_axis(const Spacing& spacing, const Spacing& target, std::optional<bool> force,
                               double threshold);

// How to take `shape` to `shape_out`; none where nnU-Net leaves the array alone (equal shapes).
std::optional<ResamplePlan> plan_resampling(const ResampleSpec& spec, const Index& shape, const Index& shape_out,
                                            const Spacing& spacing, const Spacing& spacing_out);

// Resamples as planned, planes across whatever axis. Shapes must be the plan's (std::invalid_argument otherwise).
template <class In>
void resample(const Volume<const In>& in, const Volume<float>& out, const ResamplePlan& plan, int threads);

extern template void resample(const Volume<const float>&, const Volume<float>&, const ResamplePlan&, int);
extern template void resample(const Volume<const Half>&, const Volume<float>&, const ResamplePlan&, int);

}  // namespace fastnnunet
