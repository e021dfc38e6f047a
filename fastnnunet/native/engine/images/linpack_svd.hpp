// LINPACK's singular value decomposition (SSVDC) of a 3 x 3 matrix in float32, step by step.
//
// ITK compares two matrices by their left singular vectors as this routine has them. Of nearly equal matrices it may
// find other signs, and of mirrored ones the same vectors, so which of two geometries ITK takes hangs on its very
// steps.
#pragma once

#include <array>

namespace fastnnunet::images {

struct LinpackSvd {
    explicit LinpackSvd(const std::array<std::array<float, 3>, 3>& matrix);

    std::array<std::array<float, 3>, 3> u{};  // rows; the vectors are its columns
    std::array<float, 3> values{};            // descending
};

}  // namespace fastnnunet::images
