#include "voxels.hpp"

#include <algorithm>
#include <cstring>
#include <new>

#include "image.hpp"

namespace fastnnunet::images {
namespace {

constexpr std::int64_t kPiece = 4096;  // numbers, so that they stay in the cache between the steps

bool machine_is_big_endian() {
    const std::uint16_t one = 1;
    std::uint8_t first;
    std::memcpy(&first, &one, 1);
    return first == 0;
}

template <class T>
void swap_bytes(T* values, std::int64_t count) {
    auto* bytes = reinterpret_cast<std::uint8_t*>(values);
    for (std::int64_t i = 0; i < count; ++i) std::reverse(bytes + i * sizeof(T), bytes + (i + 1) * sizeof(T));
}

std::int64_t count_bad(const float* values, std::int64_t count) {
    std::int64_t bad = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        bad += (bits & 0x7f800000u) == 0x7f800000u;
    }
    return bad;
}

template <class T>
std::int64_t convert(const std::uint8_t* raw, std::int64_t count, const Layout& layout, float* out) {
    const bool swap = sizeof(T) > 1 && layout.big_endian != machine_is_big_endian();
    const bool may_be_bad = !is_integer(layout.kind) || layout.rescale.on;
    const auto [on, slope, intercept, through_float] = layout.rescale;
    std::int64_t bad = 0;
    T piece[kPiece];
    for (std::int64_t start = 0; start < count; start += kPiece) {
        const std::int64_t size = std::min(kPiece, count - start);
        std::memcpy(piece, raw + start * static_cast<std::int64_t>(sizeof(T)),
                    static_cast<std::size_t>(size) * sizeof(T));
        if (swap) swap_bytes(piece, size);
        float* to = out + start;
        if (!on) {
            for (std::int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(piece[i]);
        } else if (through_float && sizeof(T) <= 8 && layout.kind != Kind::f64) {
            for (std::int64_t i = 0; i < size; ++i) {
                to[i] = static_cast<float>(static_cast<double>(static_cast<float>(piece[i])) * slope + intercept);
            }
        } else {
            for (std::int64_t i = 0; i < size; ++i) {
                to[i] = static_cast<float>(static_cast<double>(piece[i]) * slope + intercept);
            }
        }
        if (may_be_bad) bad += count_bad(to, size);
    }
    return bad;
}

}  // namespace

int bytes_of(Kind kind) {
    switch (kind) {
        case Kind::u8:
        case Kind::i8: return 1;
        case Kind::u16:
        case Kind::i16: return 2;
        case Kind::u32:
        case Kind::i32:
        case Kind::f32: return 4;
        default: return 8;
    }
}

bool is_integer(Kind kind) { return kind != Kind::f32 && kind != Kind::f64; }

std::int64_t to_floats(const std::uint8_t* raw, std::int64_t count, const Layout& layout, float* out) {
    switch (layout.kind) {
        case Kind::u8: return convert<std::uint8_t>(raw, count, layout, out);
        case Kind::i8: return convert<std::int8_t>(raw, count, layout, out);
        case Kind::u16: return convert<std::uint16_t>(raw, count, layout, out);
        case Kind::i16: return convert<std::int16_t>(raw, count, layout, out);
        case Kind::u32: return convert<std::uint32_t>(raw, count, layout, out);
        case Kind::i32: return convert<std::int32_t>(raw, count, layout, out);
        case Kind::u64: return convert<std::uint64_t>(raw, count, layout, out);
        case Kind::i64: return convert<std::int64_t>(raw, count, layout, out);
        case Kind::f32: return convert<float>(raw, count, layout, out);
        default: return convert<double>(raw, count, layout, out);
    }
}

std::int64_t count_of(const std::vector<std::int64_t>& sizes) {
    std::int64_t count = 1;
    for (const std::int64_t size : sizes) count = product(count, size);
    return count;
}

std::int64_t Volume::size() const { return count_of(sizes_xyz); }

Volume read_volume(Stored& stored, std::int64_t skip, const std::vector<std::int64_t>& sizes_xyz,
                   const Layout& layout) {
    const std::int64_t count = count_of(sizes_xyz);
    const std::int64_t bytes = bytes_of(layout.kind), need = product(count, bytes);
    if (skip > kMostBytes / 4 || need > kMostBytes / 4) refuse_memory(stored.path(), need);
    if (stored.packed()) {
        check_claim(stored.path(), skip + need, stored.stored_bytes(), kDeflateRatio);
    } else {
        check_claim(stored.path(), need, std::max<std::int64_t>(0, stored.stored_bytes() - skip));
    }
    const std::int64_t kept = stored.packed() ? skip : 0;  // what is not packed is passed over
    Volume volume{sizes_xyz, nullptr, 0};
    if (bytes <= 4) {  // read to the end of the floats' own memory, and made floats from the front on
        volume.voxels = new_floats(stored.path(), count, kept, kPaddingBytes + 1);
        auto* end = reinterpret_cast<std::uint8_t*>(volume.voxels.get()) + count * 4;
        stored.read(skip, need, end - need - skip);
        volume.bad = to_floats(end - need, count, layout, volume.voxels.get());
        return volume;
    }
    const auto raw = new_floats(stored.path(), count * 2, kept, kPaddingBytes + 1);
    auto* numbers = reinterpret_cast<std::uint8_t*>(raw.get());
    stored.read(skip, need, numbers - skip);
    volume.voxels = new_floats(stored.path(), count);
    volume.bad = to_floats(numbers, count, layout, volume.voxels.get());
    return volume;
}

}  // namespace fastnnunet::images
