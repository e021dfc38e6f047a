#include "linear.hpp"

namespace fastnnunet::images {

std::array<double, 4> quaternion_of(const Matrix3& m) {
    Square<4> k{};
    k[0][0] = m[0][0] - m[1][1] - m[2][2];
    k[1][1] = m[1][1] - m[0][0] - m[2][2];
    k[2][2] = m[2][2] - m[0][0] - m[1][1];
    k[3][3] = m[0][0] + m[1][1] + m[2][2];
    k[1][0] = k[0][1] = m[0][1] + m[1][0];
    k[2][0] = k[0][2] = m[0][2] + m[2][0];
    k[2][1] = k[1][2] = m[1][2] + m[2][1];
    k[3][0] = k[0][3] = m[2][1] - m[1][2];
    k[3][1] = k[1][3] = m[0][2] - m[2][0];
    k[3][2] = k[2][3] = m[1][0] - m[0][1];
    // Its eigenvalues are 3, -1, -1, -1 for a rotation: with 1 added to each, its longest column is the eigenvector,
    // and multiplying by the matrix makes short work of what is left of the others where it is not quite one.
    for (int i = 0; i < 4; ++i) k[i][i] += 1;
    int longest = 0;
    for (int j = 1; j < 4; ++j) {
        if (k[j][j] > k[longest][longest]) longest = j;
    }
    std::array<double, 4> q{k[0][longest], k[1][longest], k[2][longest], k[3][longest]};
    for (int step = 0; step < 4; ++step) {
        std::array<double, 4> next{};
        double norm = 0;
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) next[i] += k[i][j] * q[j];
            norm = length(norm, next[i]);
        }
        for (int i = 0; i < 4; ++i) q[i] = next[i] / norm;
    }
    const double sign = q[3] < 0 ? -1 : 1;
    return {sign * q[3], sign * q[0], sign * q[1], sign * q[2]};
}

}  // namespace fastnnunet::images
