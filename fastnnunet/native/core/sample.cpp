#include "core/sample.hpp"

#include "core/half.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

constexpr std::int64_t CHUNK = 4096;  // points a thread takes at a time
constexpr float SCORE = 1000.0f;  // nnU-Net's scale of a weight before it becomes a half float

struct Axis {
    std::int64_t below;  // the neighbour below the point
    float weights[2];  // of the neighbours below and above
    std::int64_t size;

    // of `space` voxels that the coordinate counts in, there are `size` from `first` on
    Axis(float coordinate, std::int64_t space, std::int64_t first, std::int64_t size) : size(size) {
        const float position = ((coordinate + 1) * static_cast<float>(space) - 1) / 2;
        below = static_cast<std::int64_t>(position);  // toward zero; std::floor is a call on older processors
        below -= static_cast<float>(below) > position;
        const float floor = static_cast<float>(below);
        weights[0] = (floor + 1) - position;
        weights[1] = position - floor;
        below -= first;
    }
    bool has(std::int64_t index) const { return index >= 0 && index < size; }
    bool has_both() const { return below >= 0 && below + 1 < size; }
    std::int64_t nearest() const {  // ties to even, as torch
        return below + (weights[1] > 0.5f || (weights[1] == 0.5f && (below & 1) != 0));
    }
};

// The 2^D neighbours of a point, x fastest.
template <int D>
struct Neighbours {
    static constexpr int COUNT = 1 << D;
    Axis x, y, z;
    std::array<std::int64_t, 2> stride;
    std::int64_t offset[COUNT];
    float weight[COUNT];
    bool inside[COUNT];
    bool all_inside;

    template <class T>
    Neighbours(const float* point, const Volumes<T>& of, const Shape& space, const Shape& first)
        : x(point[0], space[2], first[2], of.shape[2]),
          y(point[1], space[1], first[1], of.shape[1]),
          z(D == 3 ? point[2] : 0.0f, D == 3 ? space[0] : 1, D == 3 ? first[0] : 0, of.shape[0]),
          stride(of.stride),
          all_inside(x.has_both() && y.has_both() && (D == 2 || z.has_both())) {
        for (int k = 0; k < COUNT; ++k) {
            const int dx = k & 1, dy = (k >> 1) & 1, dz = k >> 2;
            const std::int64_t at_x = x.below + dx, at_y = y.below + dy, at_z = D == 3 ? z.below + dz : 0;
            inside[k] = all_inside || (x.has(at_x) && y.has(at_y) && z.has(at_z));
            offset[k] = at_z * stride[0] + at_y * stride[1] + at_x;
            weight[k] = x.weights[dx] * y.weights[dy];
            if (D == 3) weight[k] *= z.weights[dz];
        }
    }

    float coverage() const {
        float sum = 0;
        for (int k = 0; k < COUNT; ++k) {
            if (inside[k]) sum += weight[k];
        }
        return sum;
    }

    float value(const float* volume) const {
        float sum = 0;
        if (all_inside) {
            for (int k = 0; k < COUNT; ++k) sum += volume[offset[k]] * weight[k];
        } else {
            for (int k = 0; k < COUNT; ++k) {
                if (inside[k]) sum += volume[offset[k]] * weight[k];
            }
        }
        return sum;
    }

    std::int16_t nearest(const std::int16_t* volume, std::int16_t outside) const {
        const std::int64_t at_x = x.nearest(), at_y = y.nearest(), at_z = z.nearest();
        const bool has = x.has(at_x) && y.has(at_y) && z.has(at_z);
        return has ? volume[at_z * stride[0] + at_y * stride[1] + at_x] : outside;
    }

    std::int16_t label(const std::int16_t* volume, std::int16_t outside) const {
        std::int16_t around[COUNT];
        bool agree = true;
        for (int k = 0; k < COUNT; ++k) {
            around[k] = inside[k] ? volume[offset[k]] : outside;
            agree = agree && around[k] == around[0];
        }
        if (agree) return around[0];
        const auto score = [&](std::int16_t label) {
            float sum = 0;  // what nnU-Net samples for `outside` is its indicator less 1, so that zeros can be around it
            for (int k = 0; k < COUNT; ++k) {
                if (inside[k] && (around[k] == label) != (label == outside)) {
                    sum += (label == outside ? -SCORE : SCORE) * weight[k];
                }
            }
            return to_float(to_half(label == outside ? sum + SCORE : sum));
        };
        std::int16_t winner = around[0];
        float best = score(winner);
        for (int k = 1; k < COUNT; ++k) {
            if (around[k] == winner) continue;
            const float its = score(around[k]);
            if (its > best || (its == best && around[k] < winner)) {
                winner = around[k];
                best = its;
            }
        }
        const std::int16_t near = nearest(volume, outside);
        return near == winner || score(near) == best ? near : winner;
    }
};

template <int D>
void sample_points(const Volumes<const float>& values, const Volumes<const std::int16_t>& labels, const Grid& grid,
                   std::int16_t outside, float* values_out, std::int16_t* labels_out, std::int64_t first,
                   std::int64_t last) {
    const bool alike = values.stride == labels.stride;
    for (std::int64_t point = first; point < last; ++point) {
        const float* coordinates = grid.coordinates + D * point;
        const Neighbours<D> around(coordinates, values, values.shape, {0, 0, 0});
        for (std::int64_t c = 0; c < values.count; ++c) {
            values_out[c * grid.points + point] = around.value(values[c].data);
        }
        const Neighbours<D> of_labels = alike ? around : Neighbours<D>(coordinates, labels, labels.shape, {0, 0, 0});
        for (std::int64_t c = 0; c < labels.count; ++c) {
            labels_out[c * grid.points + point] = of_labels.label(labels[c].data, outside);
        }
    }
}

template <int D>
void sample_points_inside(const Volumes<const float>& values, const Shape& space, const Shape& lower, const Grid& grid,
                          float nothing, float* out, std::int64_t first, std::int64_t last) {
    for (std::int64_t point = first; point < last; ++point) {
        const Neighbours<D> around(grid.coordinates + D * point, values, space, lower);
        const float coverage = around.coverage();
        for (std::int64_t c = 0; c < values.count; ++c) {
            out[c * grid.points + point] = coverage >= 0.5f ? around.value(values[c].data) / coverage : nothing;
        }
    }
}

template <class Body>
void in_chunks(std::int64_t points, int threads, const Body& body) {
    parallel_for((points + CHUNK - 1) / CHUNK, threads, [&](std::int64_t chunk) {
        const std::int64_t first = chunk * CHUNK;
        body(first, first + CHUNK < points ? first + CHUNK : points);
    });
}

}  // namespace

void sample(const Volumes<const float>& values, const Volumes<const std::int16_t>& labels, const Grid& grid,
            std::int16_t outside, float* values_out, std::int16_t* labels_out, int threads) {
    const auto part = grid.axes == 3 ? sample_points<3> : sample_points<2>;
    in_chunks(grid.points, threads, [&](std::int64_t first, std::int64_t last) {
        part(values, labels, grid, outside, values_out, labels_out, first, last);
    });
}

void sample_inside(const Volumes<const float>& values, const Shape& space, const Shape& lower, const Grid& grid,
                   float nothing, float* out, int threads) {
    const auto part = grid.axes == 3 ? sample_points_inside<3> : sample_points_inside<2>;
    in_chunks(grid.points, threads, [&](std::int64_t first, std::int64_t last) {
        part(values, space, lower, grid, nothing, out, first, last);
    });
}

}  // namespace fastnnunet
