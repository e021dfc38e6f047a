// NumPy arrays as views of the core.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>

#include "core/view.hpp"

namespace nb = nanobind;

template <>
struct nanobind::detail::dtype_traits<fastnnunet::Half> {
    static constexpr dlpack::dtype value{static_cast<std::uint8_t>(dlpack::dtype_code::Float), 16, 1};
    static constexpr auto name = const_name("float16");
};

namespace fastnnunet {

template <class T>
using Array3 = nb::ndarray<T, nb::ndim<3>, nb::device::cpu>;
template <class T>
using Array4 = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;

template <class T>
using Rows = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class A>
void require_contiguous_rows(const A& array) {
    const std::size_t last = array.ndim() - 1;
    if (array.size() > 0 && array.shape(last) > 1 && array.stride(last) != 1) {
        throw std::invalid_argument("the last axis of an array must be contiguous");
    }
}

template <class T>
Volume<T> volume(const Array3<T>& array) {
    require_contiguous_rows(array);
    const auto size = [&](int axis) { return static_cast<std::int64_t>(array.shape(axis)); };
    return {array.data(), {size(0), size(1), size(2)}, {array.stride(0), array.stride(1)}};
}

template <class T>
Volumes<T> volumes(const Array4<T>& array) {
    require_contiguous_rows(array);
    const auto size = [&](int axis) { return static_cast<std::int64_t>(array.shape(axis)); };
    return {array.data(), size(0), array.stride(0), {size(1), size(2), size(3)}, {array.stride(1), array.stride(2)}};
}

// NumPy's booleans are bytes that are 0 or 1
template <class Byte, class Bool>
Volume<Byte> bytes(const Array3<Bool>& array) {
    const Volume<Bool> booleans = volume(array);
    return {reinterpret_cast<Byte*>(booleans.data), booleans.shape, booleans.stride};
}

}  // namespace fastnnunet
