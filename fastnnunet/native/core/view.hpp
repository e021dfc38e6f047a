// Arrays that belong to someone else. The last axis is contiguous, the others have any stride, counted in elements.
#pragma once

#include <array>
#include <cstdint>

namespace fastnnunet {

using Index = std::array<std::int64_t, 3>;  // z, y, x: a voxel, a shape, or the number of a chunk

struct Box {
    Index start, stop;  // half open
};

// The bits of an IEEE 754 half precision number.
struct Half {
    std::uint16_t bits;
};

template <class T>
struct Volume {  // z, y, x
    T* data;
    std::array<std::int64_t, 3> shape;
    std::array<std::int64_t, 2> stride;

    T* row(std::int64_t z, std::int64_t y) const { return data + z * stride[0] + y * stride[1]; }
    std::int64_t rows() const { return shape[0] * shape[1]; }
    T* row(std::int64_t number) const { return row(number / shape[1], number % shape[1]); }
    std::int64_t size() const { return rows() * shape[2]; }
    bool is_contiguous() const { return stride[1] == shape[2] && stride[0] == shape[1] * shape[2]; }
};

template <class T>
struct Volumes {  // channels or heads, z, y, x
    T* data;
    std::int64_t count;
    std::int64_t count_stride;
    std::array<std::int64_t, 3> shape;
    std::array<std::int64_t, 2> stride;

    Volume<T> operator[](std::int64_t index) const { return {data + index * count_stride, shape, stride}; }
};

}  // namespace fastnnunet
