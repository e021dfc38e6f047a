#include "grid.hpp"

#include <cmath>
#include <cstring>

#include "image.hpp"
#include "linear.hpp"
#include "text.hpp"

namespace fastnnunet::images {

Grid plain_grid(int axes) {
    Grid grid;
    grid.axes = axes;
    for (int i = 0; i < axes; ++i) {
        grid.spacing[i] = 1;
        grid.cosine(i, i) = 1;
    }
    return grid;
}

void settle(Grid& grid, const std::string& path) {
    const int n = grid.axes;
    for (int column = 0; column < n; ++column) {
        const double sign = grid.spacing[column] < 0 ? -1 : 1;
        grid.spacing[column] *= sign;
        grid.origin[column] += 0.0;
        for (int row = 0; row < n; ++row) grid.cosine(row, column) = grid.cosine(row, column) * sign + 0.0;
    }
    const auto refuse = [&](const char* name, const double* values, int count, const char* expected) {
        throw ImageError(path + " has a damaged header: its " + name + " is (" +
                         joined(std::vector<double>(values, values + count), general) + "), expected " + expected +
                         "; export it again");
    };
    for (int i = 0; i < n; ++i) {
        const double spacing = grid.spacing[i];
        if (!std::isfinite(spacing) || !(spacing > 0)) refuse("spacing", grid.spacing.data(), n, "millimetres");
    }
    for (int i = 0; i < n; ++i) {
        if (!std::isfinite(grid.origin[i])) refuse("origin", grid.origin.data(), n, "numbers");
    }
    Affine whole = identity<4>();
    for (int row = 0; row < n; ++row) {
        for (int column = 0; column < n; ++column) {
            whole[row][column] = grid.cosine(row, column);
            if (!std::isfinite(whole[row][column])) refuse("direction", grid.direction.data(), n * n, "numbers");
        }
    }
    if (determinant<4>(whole) == 0) {
        throw ImageError(path + " has a damaged header: Bad direction, determinant is 0; export it again");
    }
}

Orientation orientation_of(const Grid& grid) {
    Orientation out;
    std::array<bool, 3> row_taken{}, column_taken{};
    for (int round = 0; round < 3; ++round) {
        int best_row = -1, best_column = -1;
        double best = -1;
        for (int row = 0; row < 3; ++row) {
            for (int column = 0; column < 3; ++column) {
                const double size = std::fabs(grid.cosine(row, column));
                if (row_taken[row] || column_taken[column] || size < best) continue;  // of equal ones the last
                best = size;
                best_row = row;
                best_column = column;
            }
        }
        row_taken[best_row] = column_taken[best_column] = true;
        out.axis[best_column] = best_row;
        out.against[best_column] = !(grid.cosine(best_row, best_column) > 0);
    }
    return out;
}

Turn turn_between(const Orientation& from, const Orientation& to) {
    Turn turn;
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
            if (from.axis[j] != to.axis[i]) continue;
            turn.from[i] = j;
            turn.flipped[i] = from.against[j] != to.against[i];
        }
    }
    return turn;
}

Grid turned(const Grid& grid, const Turn& turn, const std::array<std::int64_t, 3>& sizes_xyz) {
    Grid out = grid;
    std::array<double, 3> first{};  // voxel of the axes in their new order that becomes the origin
    for (int i = 0; i < 3; ++i) {
        const int j = turn.from[i];
        out.spacing[i] = grid.spacing[j];
        for (int row = 0; row < 3; ++row) out.cosine(row, i) = grid.cosine(row, j);
        if (turn.flipped[i]) first[i] = static_cast<double>(sizes_xyz[j] - 1);
    }
    for (int row = 0; row < 3; ++row) {
        for (int i = 0; i < 3; ++i) out.origin[row] += out.cosine(row, i) * out.spacing[i] * first[i];
    }
    for (int i = 0; i < 3; ++i) {
        for (int row = 0; row < 3 && turn.flipped[i]; ++row) out.cosine(row, i) = 0.0 - out.cosine(row, i);
    }
    return out;
}

std::array<std::int64_t, 3> turned_sizes(const std::array<std::int64_t, 3>& sizes_xyz, const Turn& turn) {
    return {sizes_xyz[turn.from[0]], sizes_xyz[turn.from[1]], sizes_xyz[turn.from[2]]};
}

namespace {

template <class T>
void copy_turned(const T* from, const std::array<std::int64_t, 3>& sizes, const Turn& turn, T* to) {
    const std::array<std::int64_t, 3> stride{1, sizes[0], sizes[0] * sizes[1]};
    const auto out = turned_sizes(sizes, turn);
    std::array<std::int64_t, 3> step{};
    std::int64_t start = 0;
    for (int i = 0; i < 3; ++i) {
        step[i] = turn.flipped[i] ? -stride[turn.from[i]] : stride[turn.from[i]];
        if (turn.flipped[i]) start += (out[i] - 1) * stride[turn.from[i]];
    }
    for (std::int64_t z = 0; z < out[2]; ++z) {
        for (std::int64_t y = 0; y < out[1]; ++y) {
            const T* row = from + start + z * step[2] + y * step[1];
            for (std::int64_t x = 0; x < out[0]; ++x) *to++ = row[x * step[0]];
        }
    }
}

}  // namespace

void turn_voxels(const void* from, const std::array<std::int64_t, 3>& sizes_xyz, int bytes, const Turn& turn,
                 void* to) {
    if (bytes == 1) {
        copy_turned(static_cast<const std::uint8_t*>(from), sizes_xyz, turn, static_cast<std::uint8_t*>(to));
    } else if (bytes == 2) {
        copy_turned(static_cast<const std::uint16_t*>(from), sizes_xyz, turn, static_cast<std::uint16_t*>(to));
    } else {
        copy_turned(static_cast<const float*>(from), sizes_xyz, turn, static_cast<float*>(to));
    }
}

}  // namespace fastnnunet::images
