#include "npz.hpp"

#include <algorithm>
#include <new>
#include <string_view>
#include <vector>

#include "deflate.hpp"
#include "image.hpp"
#include "libdeflate.h"
#include "reader.hpp"

namespace fastnnunet::images {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr const char* kEntry = "probabilities.npy";
constexpr std::size_t kNameBytes = 17;
constexpr std::uint64_t kLongest = 0xffffffffu;  // larger sizes and places are in fields of their own

void put(Bytes& to, std::uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) to.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
}

void put(Bytes& to, std::string_view text) { to.insert(to.end(), text.begin(), text.end()); }

// NumPy's format 1.0: the description fills up to a multiple of 64 bytes
Bytes npy_header(const std::array<std::int64_t, 4>& shape) {
    std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
    for (std::size_t axis = 0; axis < shape.size(); ++axis) text += (axis ? ", " : "") + std::to_string(shape[axis]);
    text += "), }";
    text.append(63 - (10 + text.size()) % 64, ' ');
    text += '\n';
    Bytes header;
    put(header, std::string_view("\x93NUMPY\x01\x00", 8));
    put(header, text.size(), 2);
    put(header, text);
    return header;
}

bool is_large(std::uint64_t packed, std::uint64_t size) { return packed >= kLongest || size >= kLongest; }

// What the entry's own header and the list at the end say in the same words
void put_entry(Bytes& to, std::uint32_t sum, std::uint64_t packed, std::uint64_t size) {
    put(to, 45, 2);  // version 4.5 has large files
    put(to, 0, 2);
    put(to, 8, 2);  // deflate
    put(to, 0, 2);
    put(to, 0x21, 2);  // the first day that the format knows: files do not depend on the clock
    put(to, sum, 4);
    put(to, is_large(packed, size) ? kLongest : packed, 4);
    put(to, is_large(packed, size) ? kLongest : size, 4);
    put(to, kNameBytes, 2);
}

void put_sizes(Bytes& to, std::uint64_t packed, std::uint64_t size) {
    put(to, 1, 2);
    put(to, 16, 2);
    put(to, size, 8);
    put(to, packed, 8);
}

}  // namespace

void write_probabilities(const std::string& path, const float* values, const std::array<std::int64_t, 4>& shape_HZYX) {
    const std::size_t row = static_cast<std::size_t>(shape_HZYX[3]) * sizeof(float);
    const std::size_t bytes = row * static_cast<std::size_t>(shape_HZYX[0] * shape_HZYX[1] * shape_HZYX[2]);
    const auto* voxels = reinterpret_cast<const std::uint8_t*>(values);
    const Bytes header = npy_header(shape_HZYX);
    const std::uint64_t size = header.size() + bytes;
    try {
        // a zlib stream is two bytes, what a zip file has, and four bytes
        const Bytes packed = deflated(header, voxels, bytes, Packing::zlib, sizeof(float), row);
        const std::uint64_t packed_size = packed.size() - 6;
        const std::uint32_t sum = libdeflate_crc32(libdeflate_crc32(0, header.data(), header.size()), voxels, bytes);
        const bool large = is_large(packed_size, size);

        Bytes file;
        file.reserve(packed.size() + 512);
        put(file, "PK\x03\x04");
        put_entry(file, sum, packed_size, size);
        put(file, large ? 20 : 0, 2);
        put(file, kEntry);
        if (large) put_sizes(file, packed_size, size);
        file.insert(file.end(), packed.begin() + 2, packed.end() - 4);

        const std::uint64_t list = file.size();
        put(file, "PK\x01\x02");
        put(file, 45, 2);  // by which version it was made
        put_entry(file, sum, packed_size, size);
        put(file, large ? 20 : 0, 2);
        put(file, 0, 8);  // no comment, one disk, no attributes, the entry at the file's beginning
        put(file, 0, 6);
        put(file, kEntry);
        if (large) put_sizes(file, packed_size, size);
        const std::uint64_t length = file.size() - list;
        if (list >= kLongest) {
            const std::uint64_t end = file.size();
            put(file, "PK\x06\x06");
            put(file, 44, 8);  // bytes that follow
            put(file, 45, 2);
            put(file, 45, 2);
            put(file, 0, 8);  // disks
            put(file, 1, 8);  // entries, here and in all
            put(file, 1, 8);
            put(file, length, 8);
            put(file, list, 8);
            put(file, "PK\x06\x07");
            put(file, 0, 4);
            put(file, end, 8);
            put(file, 1, 4);
        }
        put(file, "PK\x05\x06");
        put(file, 0, 4);
        put(file, 1, 2);
        put(file, 1, 2);
        put(file, length, 4);
        put(file, std::min(list, kLongest), 4);
        put(file, 0, 2);
        write_file(path, file);
    } catch (const std::bad_alloc&) {
        refuse_memory("the probabilities of " + path, static_cast<std::int64_t>(size));
    }
}

bool is_probabilities(const std::string& path) {
    constexpr std::int64_t kEndBytes = 22;
    try {
        File file(path);
        if (file.size() < kEndBytes) return false;
        const Bytes end = file.read(std::max<std::int64_t>(0, file.size() - 256), 256);
        const std::string_view text(reinterpret_cast<const char*>(end.data()), end.size());
        const std::size_t mark = text.rfind("PK\x05\x06");
        return mark != std::string_view::npos && text.size() - mark >= kEndBytes &&
               text.substr(0, mark).find(kEntry) != std::string_view::npos;
    } catch (const ImageError&) {
        return false;
    }
}

}  // namespace fastnnunet::images
