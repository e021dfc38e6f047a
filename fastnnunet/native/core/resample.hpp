// Resampling of volumes: one AxisOperator per axis, float64 inside.
//
// float64 because nnU-Net (scikit-image, SciPy) computes so: with it all but one value in a hundred equal nnU-Net's in
// every bit of float32. The work is bound by memory, and intermediate values in float32 would not halve the time.
#pragma once

#include <array>

#include "core/axis_operator.hpp"
#include "core/view.hpp"

namespace fastnnunet {

// What the result is clipped to: nothing, the range of the whole input, or per input plane (z) the range of that plane,
// before planes are combined.
enum class Clip { none, whole, per_plane };

using AxisOperators = std::array<AxisOperator, 3>;  // z, y, x

// In: float or Half; Out: float or double. Shapes must be those of the operators (std::invalid_argument otherwise).
template <class In, class Out>
void resample(const Volume<const In>& in, const Volume<Out>& out, const AxisOperators& operators, Clip clip,
              int threads);

extern template void resample(const Volume<const float>&, const Volume<float>&, const AxisOperators&, Clip, int);
extern template void resample(const Volume<const float>&, const Volume<double>&, const AxisOperators&, Clip, int);
extern template void resample(const Volume<const Half>&, const Volume<float>&, const AxisOperators&, Clip, int);

}  // namespace fastnnunet
