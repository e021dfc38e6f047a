// Arrays of their own, contiguous and not initialised.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <variant>

#include "core/view.hpp"

namespace fastnnunet::engine {

inline std::int64_t voxels_of(const Index& shape) { return shape[0] * shape[1] * shape[2]; }

template <class T>
std::unique_ptr<T[]> allocate(std::int64_t count) {
    return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(std::max<std::int64_t>(1, count))]);
}

template <class T>
struct Array3 {  // z, y, x
    Array3() = default;
    explicit Array3(const Index& shape) : values(allocate<T>(voxels_of(shape))), shape(shape) {}

    std::unique_ptr<T[]> values;
    Index shape{};

    std::int64_t size() const { return voxels_of(shape); }
    Volume<T> view() const { return {values.get(), shape, {shape[1] * shape[2], shape[2]}}; }
    Volume<const T> read() const { return {values.get(), shape, {shape[1] * shape[2], shape[2]}}; }
    void fill(T value) { std::fill(values.get(), values.get() + size(), value); }
};

template <class T>
struct Array4 {  // channels or heads, z, y, x
    Array4() = default;
    Array4(std::int64_t count, const Index& shape)
        : values(allocate<T>(count * voxels_of(shape))), count(count), shape(shape) {}

    std::shared_ptr<T[]> values;  // of one owner; a reader's memory may need another end than delete[]
    std::int64_t count = 0;
    Index shape{};

    std::int64_t size() const { return count * voxels_of(shape); }
    Volumes<T> view() const { return {values.get(), count, voxels_of(shape), shape, {shape[1] * shape[2], shape[2]}}; }
    Volumes<const T> read() const {
        return {values.get(), count, voxels_of(shape), shape, {shape[1] * shape[2], shape[2]}};
    }
};

// A label map in the type that its labels need.
using LabelMap = std::variant<Array3<std::uint8_t>, Array3<std::uint16_t>>;

inline Index extent(const Box& box) {
    return {box.stop[0] - box.start[0], box.stop[1] - box.start[1], box.stop[2] - box.start[2]};
}

// The part of a view in a box
template <class T>
Volume<T> part(const Volume<T>& whole, const Box& box) {
    return {whole.row(box.start[0], box.start[1]) + box.start[2], extent(box), whole.stride};
}

template <class T>
Volumes<T> part(const Volumes<T>& whole, const Box& box) {
    const Volume<T> first = part(whole[0], box);
    return {first.data, whole.count, whole.count_stride, first.shape, whole.stride};
}

template <class T>
Volumes<const T> readable(const Volumes<T>& of) {
    return {of.data, of.count, of.count_stride, of.shape, of.stride};
}

// Threads for a pass over so many values that takes `work` times as long as most; 0: all cores. As fastnnunet/native.
inline int pass_threads(int threads, std::int64_t values, std::int64_t work = 1) {
    return values * work <= (std::int64_t{1} << 19) ? 1 : threads;
}

}  // namespace fastnnunet::engine
