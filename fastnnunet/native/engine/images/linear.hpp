// Arithmetic of small matrices.
#pragma once

#include <array>
#include <cmath>
#include <utility>

namespace fastnnunet::images {

template <int N>
using Square = std::array<std::array<double, N>, N>;  // rows
using Matrix3 = Square<3>;
using Affine = Square<4>;

// sqrt(a * a + b * b) without overflow. Not std::hypot, for which newer systems' glibc would be needed.
inline double length(double a, double b) {
    const double most = std::fabs(a) > std::fabs(b) ? std::fabs(a) : std::fabs(b);
    if (!(most > 0)) return most;
    return most * std::sqrt((a / most) * (a / most) + (b / most) * (b / most));
}

template <int N>
Square<N> identity() {
    Square<N> matrix{};
    for (int i = 0; i < N; ++i) matrix[i][i] = 1;
    return matrix;
}

template <int N>
Square<N> multiplied(const Square<N>& a, const Square<N>& b) {
    Square<N> out{};
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < N; ++j) {
            for (int k = 0; k < N; ++k) out[i][j] += a[i][k] * b[k][j];
        }
    }
    return out;
}

template <int N>
Square<N> transposed(const Square<N>& a) {
    Square<N> out;
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < N; ++j) out[i][j] = a[j][i];
    }
    return out;
}

// By elimination with the largest pivots, as LAPACK has it
template <int N>
double determinant(Square<N> a) {
    double result = 1;
    for (int column = 0; column < N; ++column) {
        int pivot = column;
        for (int row = column + 1; row < N; ++row) {
            if (std::fabs(a[row][column]) > std::fabs(a[pivot][column])) pivot = row;
        }
        if (a[pivot][column] == 0) return 0;
        if (pivot != column) {
            std::swap(a[pivot], a[column]);
            result = -result;
        }
        result *= a[column][column];
        for (int row = column + 1; row < N; ++row) {
            const double factor = a[row][column] / a[column][column];
            for (int k = column; k < N; ++k) a[row][k] -= factor * a[column][k];
        }
    }
    return result;
}

// a = u * diag(w) * transposed(v), w descending: rotations of pairs of columns until all are perpendicular (Hestenes)
template <int N>
struct Svd {
    Square<N> u, v;
    std::array<double, N> w{};

    explicit Svd(const Square<N>& a) : u(a), v(identity<N>()) {
        for (int sweep = 0; sweep < 60 && rotate_all(); ++sweep) {
        }
        for (int j = 0; j < N; ++j) {
            for (int i = 0; i < N; ++i) w[j] = length(w[j], u[i][j]);
            for (int i = 0; i < N && w[j] > 0; ++i) u[i][j] /= w[j];
        }
        for (int i = 0; i < N; ++i) {
            int best = i;
            for (int j = i + 1; j < N; ++j) {
                if (w[j] > w[best]) best = j;
            }
            std::swap(w[i], w[best]);
            for (int row = 0; row < N; ++row) {
                std::swap(u[row][i], u[row][best]);
                std::swap(v[row][i], v[row][best]);
            }
        }
    }

    // The orthogonal matrix next to a
    Square<N> polar() const { return multiplied<N>(u, transposed<N>(v)); }

private:
    bool rotate_all() {
        bool rotated = false;
        for (int p = 0; p < N; ++p) {
            for (int q = p + 1; q < N; ++q) {
                double alpha = 0, beta = 0, gamma = 0;
                for (int i = 0; i < N; ++i) {
                    alpha += u[i][p] * u[i][p];
                    beta += u[i][q] * u[i][q];
                    gamma += u[i][p] * u[i][q];
                }
                if (!(std::fabs(gamma) > 1e-17 * std::sqrt(alpha * beta))) continue;
                rotated = true;
                const double zeta = (beta - alpha) / (2 * gamma);
                const double t = (zeta < 0 ? -1 : 1) / (std::fabs(zeta) + length(1.0, zeta));
                const double c = 1 / length(1.0, t), s = c * t;
                for (int i = 0; i < N; ++i) {
                    rotate(u[i][p], u[i][q], c, s);
                    rotate(v[i][p], v[i][q], c, s);
                }
            }
        }
        return rotated;
    }

    static void rotate(double& a, double& b, double c, double s) {
        const double before = a;
        a = c * a - s * b;
        b = s * before + c * b;
    }
};

// Quaternion (w, x, y, z) with w >= 0 of a rotation: the eigenvector of the largest eigenvalue of a symmetric matrix
// made of it (Bar-Itzhack 2000), as nibabel has it
std::array<double, 4> quaternion_of(const Matrix3& rotation);

}  // namespace fastnnunet::images
