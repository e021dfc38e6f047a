// Which of qform and sform ITK 5.4 takes and what it makes of it, and the header that it writes; in the float32 and
// float64 that it and the NIfTI library compute in, so that results agree to the last bit where that is possible.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "grid.hpp"
#include "image.hpp"
#include "linear.hpp"
#include "linpack_svd.hpp"

namespace fastnnunet::images {
namespace {

using Float3 = std::array<std::array<float, 3>, 3>;
using Float4 = std::array<std::array<float, 4>, 4>;

double finite(double value) { return std::isfinite(value) ? value : 0; }

// Spacings as the NIfTI library has them: those of axes that are there are 1 where they are 0 or no number
std::array<float, 8> library_pixdim(const NiftiHeader& header) {
    std::array<float, 8> out{};
    for (int i = 0; i < 8; ++i) {
        const auto value = static_cast<float>(header.pixdim[i]);
        out[i] = i >= 1 && i <= header.axes() && (value == 0 || !std::isfinite(value)) ? 1 : value;
    }
    return out;
}

Float4 matrix_of_qform(const NiftiHeader& header, const std::array<float, 8>& pixdim) {
    double b = static_cast<float>(header.qform[0]), c = static_cast<float>(header.qform[1]),
           d = static_cast<float>(header.qform[2]);
    double a = 1.0 - (b * b + c * c + d * d);
    if (a < 1e-7) {  // half a turn
        a = 1.0 / std::sqrt(b * b + c * c + d * d);
        b *= a;
        c *= a;
        d *= a;
        a = 0;
    } else {
        a = std::sqrt(a);
    }
    const double x = pixdim[1] > 0 ? pixdim[1] : 1, y = pixdim[2] > 0 ? pixdim[2] : 1;
    const double z = (pixdim[3] > 0 ? pixdim[3] : 1) * (pixdim[0] < 0 ? -1 : 1);
    const Matrix3 m{{
        {(a * a + b * b - c * c - d * d) * x, 2 * (b * c - a * d) * y, 2 * (b * d + a * c) * z},
        {2 * (b * c + a * d) * x, (a * a + c * c - b * b - d * d) * y, 2 * (c * d - a * b) * z},
        {2 * (b * d - a * c) * x, 2 * (c * d + a * b) * y, (a * a + d * d - c * c - b * b) * z},
    }};
    Float4 out{};
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) out[i][j] = static_cast<float>(m[i][j]);
        out[i][3] = static_cast<float>(header.qform[3 + i]);
    }
    out[3][3] = 1;
    return out;
}

bool is_affine(const Float4& m) {
    if (m[3] != std::array<float, 4>{0, 0, 0, 1}) return false;
    Affine a{};
    for (int i = 0; i < 4; ++i) std::copy(m[i].begin(), m[i].end(), a[i].begin());
    const Svd<4> svd(a);
    return svd.w[3] / svd.w[0] > std::numeric_limits<double>::epsilon();
}

bool is_orthonormal(const Float4& m) {
    Float3 r{};
    for (int j = 0; j < 3; ++j) {
        const float squared = m[0][j] * m[0][j] + m[1][j] * m[1][j] + m[2][j] * m[2][j];
        const float scale = squared > 0 ? 1 / std::sqrt(squared) : 1;
        for (int i = 0; i < 3; ++i) r[i][j] = m[i][j] * scale;
    }
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
            const float dot = r[i][0] * r[j][0] + r[i][1] * r[j][1] + r[i][2] * r[j][2];
            if (!(std::fabs(dot - (i == j ? 1.0f : 0.0f)) <= 1e-4)) return false;
        }
    }
    return true;
}

bool are_equal(const Float4& a, const Float4& b, double tolerance, int columns) {
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < columns; ++j) {
            if (!(std::fabs(a[i][j] - b[i][j]) <= tolerance)) return false;
        }
    }
    return true;
}

// Element by element, and offsets to the last bit or nearly so
bool are_similar(const Float4& sform, const Float4& qform) {
    float offset = 0, bottom = 0;
    for (int i = 0; i < 4; ++i) {
        offset += std::fabs(sform[i][3] - qform[i][3]);
        bottom += std::fabs(sform[3][i] - qform[3][i]);
    }
    return are_equal(sform, qform, 1e-5, 3) && offset <= 1e-7 && bottom <= 1e-7;
}

// By the factors of their decompositions
bool are_very_similar(const Float4& sform, const Float4& qform) {
    constexpr float kTolerance = 1e-4f;
    Float3 s{}, q{};
    for (int i = 0; i < 3; ++i) {
        std::copy(sform[i].begin(), sform[i].begin() + 3, s[i].begin());
        std::copy(qform[i].begin(), qform[i].begin() + 3, q[i].begin());
        if (std::fabs(sform[i][3] - qform[i][3]) > kTolerance) return false;
    }
    const LinpackSvd of_s(s), of_q(q);
    for (int i = 0; i < 3; ++i) {
        if (std::fabs(of_s.values[i] - of_q.values[i]) > kTolerance) return false;
        for (int j = 0; j < 3; ++j) {
            float product = 0;
            for (int k = 0; k < 3; ++k) product += of_s.u[i][k] * of_q.u[j][k];
            if (std::fabs(product - (i == j ? 1.0f : 0.0f)) > kTolerance) return false;
        }
    }
    return true;
}

Float4 chosen_matrix(const NiftiHeader& header, const std::array<float, 8>& pixdim, const std::string& path) {
    const bool has_qform = header.qform_code > 0, has_sform = header.sform_code > 0;
    Float4 qform{}, sform{};
    if (has_qform) {
        qform = matrix_of_qform(header, pixdim);
    } else {
        for (int i = 0; i < 3; ++i) qform[i][i] = pixdim[i + 1];
        qform[3][3] = 1;
    }
    if (has_sform) {
        for (int i = 0; i < 12; ++i) sform[i / 4][i % 4] = static_cast<float>(header.sform[i]);
        sform[3][3] = 1;
    }
    bool prefer_sform = are_similar(sform, qform);
    if ((!prefer_sform || has_sform) && is_affine(sform) && is_orthonormal(sform)) {
        if (!has_qform || header.sform_code == 1) {
            prefer_sform = true;
        } else {
            prefer_sform = are_very_similar(sform, qform);
        }
    }
    if (prefer_sform) return sform;
    if (has_qform) return qform;
    throw ImageError("cannot read " + path +
                     ": ITK ERROR: ITK only supports orthonormal direction cosines.  No orthonormal "
                     "definition found!\nexpected an image that SimpleITK can read");
}

double determinant_of(const Float3& m) {
    const double a = m[0][0], b = m[0][1], c = m[0][2], d = m[1][0], e = m[1][1], f = m[1][2], g = m[2][0], h = m[2][1],
                 i = m[2][2];
    return a * e * i - a * h * f - d * b * i + d * h * c + g * b * f - g * e * c;
}

Float3 inverse_of(const Float3& m) {
    const double a = m[0][0], b = m[0][1], c = m[0][2], d = m[1][0], e = m[1][1], f = m[1][2], g = m[2][0], h = m[2][1],
                 i = m[2][2];
    double scale = a * e * i - a * h * f - d * b * i + d * h * c + g * b * f - g * e * c;
    if (scale != 0) scale = 1 / scale;
    const Matrix3 out{{
        {scale * (e * i - h * f), scale * (-b * i + h * c), scale * (b * f - e * c)},
        {scale * (-d * i + g * f), scale * (a * i - g * c), scale * (-a * f + d * c)},
        {scale * (d * h - g * e), scale * (-a * h + g * b), scale * (a * e - d * b)},
    }};
    Float3 rounded{};
    for (int row = 0; row < 3; ++row) {
        for (int column = 0; column < 3; ++column) rounded[row][column] = static_cast<float>(out[row][column]);
    }
    return rounded;
}

float largest_sum(const Float3& m, bool of_rows) {
    float largest = 0;
    for (int i = 0; i < 3; ++i) {
        double sum = 0;
        for (int j = 0; j < 3; ++j) sum += std::fabs(of_rows ? m[i][j] : m[j][i]);
        largest = std::max(largest, static_cast<float>(sum));
    }
    return largest;
}

// The orthogonal matrix next to one, by Higham's iteration as the NIfTI library has it
Float3 polar_of(Float3 x) {
    float gamma = static_cast<float>(determinant_of(x));
    while (gamma == 0) {
        gamma = static_cast<float>(0.00001 * (0.001 + largest_sum(x, true)));
        for (int i = 0; i < 3; ++i) x[i][i] += gamma;
        gamma = static_cast<float>(determinant_of(x));
    }
    Float3 z = x;
    float difference = 1;
    for (int round = 0; round <= 100; ++round) {
        const Float3 y = inverse_of(x);
        float scale = 1, inverse_scale = 1;
        if (difference > 0.3) {
            const auto alpha = static_cast<float>(std::sqrt(largest_sum(x, true) * largest_sum(x, false)));
            const auto beta = static_cast<float>(std::sqrt(largest_sum(y, true) * largest_sum(y, false)));
            scale = static_cast<float>(std::sqrt(beta / alpha));
            inverse_scale = static_cast<float>(1.0 / scale);
        }
        difference = 0;
        for (int i = 0; i < 3; ++i) {
            for (int j = 0; j < 3; ++j) {
                z[i][j] = static_cast<float>(0.5 * (scale * x[i][j] + inverse_scale * y[j][i]));
            }
        }
        double sum = 0;
        for (int i = 0; i < 3; ++i) {
            for (int j = 0; j < 3; ++j) sum += std::fabs(z[i][j] - x[i][j]);
        }
        difference = static_cast<float>(sum);
        if (difference < 3e-6) break;
        x = z;
    }
    return z;
}

// Rows of unit length, made orthogonal
Float3 orthogonal(Float3 rows) {
    for (int i = 0; i < 3; ++i) {
        const float squared = rows[i][0] * rows[i][0] + rows[i][1] * rows[i][1] + rows[i][2] * rows[i][2];
        if (squared > 0) {
            const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(squared)));
            for (float& value : rows[i]) value *= scale;
        } else if (i < 2) {
            rows[i] = {i == 0 ? 1.0f : 0.0f, i == 1 ? 1.0f : 0.0f, 0.0f};
        } else {
            for (int j = 0; j < 3; ++j) {
                const int k = (j + 1) % 3, l = (j + 2) % 3;
                rows[2][j] = rows[0][k] * rows[1][l] - rows[0][l] * rows[1][k];
            }
        }
    }
    return polar_of(rows);
}

struct Quaternion {
    float b, c, d, qfac;
};

Quaternion quaternion_of_axes(const Float3& axes) {
    Matrix3 r{};
    for (int j = 0; j < 3; ++j) {
        double length = 0;
        for (int i = 0; i < 3; ++i) length += static_cast<double>(axes[i][j]) * axes[i][j];
        length = std::sqrt(length);
        for (int i = 0; i < 3; ++i) r[i][j] = length == 0 ? (i == j ? 1 : 0) : axes[i][j] / length;
    }
    Float3 rounded{};
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) rounded[i][j] = static_cast<float>(r[i][j]);
    }
    const Float3 p = polar_of(rounded);
    for (int i = 0; i < 3; ++i) std::copy(p[i].begin(), p[i].end(), r[i].begin());
    Quaternion out{0, 0, 0, 1};
    if (!(determinant_of(p) > 0)) {  // a mirror image: its third axis is turned before the rest is a rotation
        out.qfac = -1;
        for (int i = 0; i < 3; ++i) r[i][2] = -r[i][2];
    }
    double a = r[0][0] + r[1][1] + r[2][2] + 1, b, c, d;
    if (a > 0.5) {
        a = 0.5 * std::sqrt(a);
        b = 0.25 * (r[2][1] - r[1][2]) / a;
        c = 0.25 * (r[0][2] - r[2][0]) / a;
        d = 0.25 * (r[1][0] - r[0][1]) / a;
    } else {
        const double x = 1 + r[0][0] - (r[1][1] + r[2][2]), y = 1 + r[1][1] - (r[0][0] + r[2][2]),
                     z = 1 + r[2][2] - (r[0][0] + r[1][1]);
        if (x > 1) {
            b = 0.5 * std::sqrt(x);
            c = 0.25 * (r[0][1] + r[1][0]) / b;
            d = 0.25 * (r[0][2] + r[2][0]) / b;
            a = 0.25 * (r[2][1] - r[1][2]) / b;
        } else if (y > 1) {
            c = 0.5 * std::sqrt(y);
            b = 0.25 * (r[0][1] + r[1][0]) / c;
            d = 0.25 * (r[1][2] + r[2][1]) / c;
            a = 0.25 * (r[0][2] - r[2][0]) / c;
        } else {
            d = 0.5 * std::sqrt(z);
            b = 0.25 * (r[0][2] + r[2][0]) / d;
            c = 0.25 * (r[1][2] + r[2][1]) / d;
            a = 0.25 * (r[1][0] - r[0][1]) / d;
        }
        if (a < 0) {
            b = -b;
            c = -c;
            d = -d;
        }
    }
    out.b = static_cast<float>(b);
    out.c = static_cast<float>(c);
    out.d = static_cast<float>(d);
    return out;
}

class HeaderBytes {
public:
    HeaderBytes() : bytes_(352, 0) {}

    void integer(std::size_t at, std::int64_t value, int size) {
        for (int i = 0; i < size; ++i) bytes_[at + i] = static_cast<std::uint8_t>(value >> (8 * i));
    }
    void number(std::size_t at, float value) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        integer(at, bits, 4);
    }
    std::vector<std::uint8_t> take() { return std::move(bytes_); }

private:
    std::vector<std::uint8_t> bytes_;
};

}  // namespace

Grid itk_grid(const NiftiHeader& header, const std::string& path) {
    const std::array<float, 8> pixdim = library_pixdim(header);
    const double unit = header.units % 8 == 1 ? 1e3 : header.units % 8 == 3 ? 1e-3 : 1;
    const int time_unit = header.units & 0x38;
    const double time = time_unit == 16 ? 1e-3 : time_unit == 24 ? 1e-6 : 1;
    Grid grid = plain_grid(header.axes());
    for (int i = 0; i < grid.axes; ++i) grid.spacing[i] = static_cast<double>(pixdim[i + 1]) * (i < 3 ? unit : time);
    if (header.qform_code > 0 || header.sform_code > 0) {
        const Float4 m = chosen_matrix(header, pixdim, path);
        const int spatial = std::min(grid.axes, 3);
        for (int column = 0; column < spatial; ++column) {
            double length = 0;
            for (int row = 0; row < spatial; ++row) length += static_cast<double>(m[row][column]) * m[row][column];
            length = length == 0 ? 1 : std::sqrt(length);
            for (int row = 0; row < spatial; ++row) {
                grid.cosine(row, column) = (row < 2 ? -1.0 : 1.0) * m[row][column] / length;
            }
        }
        for (int row = 0; row < spatial; ++row) grid.origin[row] = (row < 2 ? -1.0 : 1.0) * m[row][3] * unit;
        if (grid.axes > 3) grid.origin[3] = static_cast<float>(finite(header.time_offset)) * time;
    }
    settle(grid, path);
    return grid;
}

std::vector<std::uint8_t> itk_nifti_header(const Grid& grid, const std::vector<std::int64_t>& sizes_xyz,
                                           int voxel_bytes) {
    const int axes = grid.axes;
    Float3 rows{};  // the axes of the image in RAS
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
            if (i >= axes || j >= axes) {
                rows[i][j] = i == j ? 1.0f : 0.0f;
            } else {
                rows[i][j] = static_cast<float>(j == 2 ? grid.cosine(j, i) : -grid.cosine(j, i));
            }
        }
    }
    rows = orthogonal(rows);
    Float3 axes_ras{};
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) axes_ras[i][j] = rows[j][i];
    }
    std::array<float, 3> offset{};
    for (int i = 0; i < axes; ++i) offset[i] = static_cast<float>(i == 2 ? grid.origin[i] : -grid.origin[i]);
    const Quaternion q = quaternion_of_axes(axes_ras);

    HeaderBytes header;
    header.integer(0, 348, 4);
    header.integer(38, 'r', 1);
    header.integer(40, axes, 2);
    for (int i = 0; i < 7; ++i) header.integer(42 + 2 * i, i < axes ? sizes_xyz[i] : 1, 2);
    header.integer(70, voxel_bytes == 1 ? 2 : 512, 2);
    header.integer(72, 8 * voxel_bytes, 2);
    header.number(76, q.qfac);
    for (int i = 0; i < 3; ++i) header.number(80 + 4 * i, i < axes ? static_cast<float>(grid.spacing[i]) : 1.0f);
    header.number(108, 352);  // where voxels begin
    header.number(112, 1);    // their slope
    header.integer(123, 10, 1);  // millimetres and seconds
    header.integer(252, 1, 2);   // both forms are of the scanner
    header.integer(254, 1, 2);
    header.number(256, q.b);
    header.number(260, q.c);
    header.number(264, q.d);
    for (int i = 0; i < 3; ++i) {
        header.number(268 + 4 * i, offset[i]);
        for (int j = 0; j < 3; ++j) {
            const bool is_scaled = i < axes && j < axes;
            const float scale = is_scaled ? static_cast<float>(grid.spacing[j]) : 1.0f;
            header.number(280 + 16 * i + 4 * j, scale * axes_ras[i][j]);
        }
        header.number(280 + 16 * i + 12, offset[i]);
    }
    header.integer(344, 'n', 1);
    header.integer(345, '+', 1);
    header.integer(346, '1', 1);
    return header.take();
}

}  // namespace fastnnunet::images
