// Numbers of any type as float32, and where they come from.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stored.hpp"

namespace fastnnunet::images {

enum class Kind : std::uint8_t { u8, i8, u16, i16, u32, i32, u64, i64, f32, f64 };

int bytes_of(Kind kind);
bool is_integer(Kind kind);

struct Rescale {
    bool on = false;
    double slope = 1, intercept = 0;
    bool through_float = false;  // ITK makes float32 of whole numbers before it rescales them
};

// How voxels are stored
struct Layout {
    Kind kind = Kind::u8;
    bool big_endian = false;
    Rescale rescale;
};

// One file's voxels. Axes: the last of `sizes_xyz` changes slowest.
struct Volume {
    std::vector<std::int64_t> sizes_xyz;
    std::shared_ptr<float[]> voxels;
    std::int64_t bad = 0;  // how many of them are NaN or infinite

    std::int64_t size() const;
};

// The content of a file from byte `skip` on as a volume. `sizes_xyz` are positive; that they fit the file is made sure
// of before memory is allocated. Throws ImageError.
Volume read_volume(Stored& stored, std::int64_t skip, const std::vector<std::int64_t>& sizes_xyz, const Layout& layout);

// `count` numbers at `raw`, as `layout` says, become floats at `out`, which may be the same memory so long as no raw
// number lies before the float made of it. Returns how many are not finite.
std::int64_t to_floats(const std::uint8_t* raw, std::int64_t count, const Layout& layout, float* out);

// The product of sizes, or kMostBytes
std::int64_t count_of(const std::vector<std::int64_t>& sizes);

}  // namespace fastnnunet::images
