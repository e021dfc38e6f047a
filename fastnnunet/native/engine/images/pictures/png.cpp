#include "png.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>

#include "../deflate.hpp"
#include "../image.hpp"
#include "../text.hpp"
#include "libdeflate.h"

namespace fastnnunet::images {
namespace {

constexpr std::uint8_t kSignature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
    throw ImageError("cannot read " + path + ": " + why + "\nexpected a PNG picture; export it again");
}

std::uint32_t big(const std::uint8_t* bytes) {
    return std::uint32_t{bytes[0]} << 24 | std::uint32_t{bytes[1]} << 16 | std::uint32_t{bytes[2]} << 8 | bytes[3];
}

struct Png {
    std::uint32_t width = 0, height = 0;
    int depth = 0, colour = 0;
    bool interlaced = false;
    std::vector<std::uint8_t> palette, packed;

    int samples() const { return colour == 2 ? 3 : colour == 4 ? 2 : colour == 6 ? 4 : 1; }
    std::int64_t row_bytes(std::int64_t pixels) const { return (pixels * samples() * depth + 7) / 8; }
};

bool is_depth(int colour, int depth) {
    switch (colour) {
        case 0: return depth == 1 || depth == 2 || depth == 4 || depth == 8 || depth == 16;
        case 3: return depth == 1 || depth == 2 || depth == 4 || depth == 8;
        case 2:
        case 4:
        case 6: return depth == 8 || depth == 16;
        default: return false;
    }
}

void read_header(Png& png, const std::uint8_t* data, std::uint32_t size, const std::string& path) {
    if (size != 13) refuse(path, "its header has another size");
    png.width = big(data);
    png.height = big(data + 4);
    png.depth = data[8];
    png.colour = data[9];
    png.interlaced = data[12] == 1;
    const bool is_known = is_depth(png.colour, png.depth) && data[10] == 0 && data[11] == 0 && data[12] <= 1;
    if (png.width == 0 || png.height == 0 || png.width > 0x7fffffff || png.height > 0x7fffffff || !is_known) {
        refuse(path, "its header is damaged");
    }
}

Png parse(const std::string& path) {
    File file(path);
    const auto content = file.read(0, static_cast<std::size_t>(file.size()));
    if (content.size() < 8 || std::memcmp(content.data(), kSignature, 8) != 0) refuse(path, "it is no PNG picture");
    Png png;
    std::size_t at = 8;
    for (bool is_end = false; !is_end;) {
        if (content.size() - at < 12) refuse(path, "it is truncated");
        const std::uint32_t size = big(content.data() + at);
        const std::uint8_t* kind = content.data() + at + 4;
        if (size > content.size() - at - 12) refuse(path, "it is truncated");
        if (libdeflate_crc32(0, kind, size + 4) != big(kind + 4 + size)) refuse(path, "a checksum in it is wrong");
        const auto is = [&](const char* name) { return std::memcmp(kind, name, 4) == 0; };
        const std::uint8_t* data = kind + 4;
        if ((at == 8) != is("IHDR")) refuse(path, "its header is not its first part");
        if (is("IHDR")) read_header(png, data, size, path);
        if (is("acTL")) throw ImageError(path + " is an animation, expected one picture");
        if (is("PLTE")) png.palette.assign(data, data + size);
        if (is("IDAT")) png.packed.insert(png.packed.end(), data, data + size);
        is_end = is("IEND");
        at += std::size_t{size} + 12;
    }
    return png;
}

std::uint8_t paeth(int a, int b, int c) {
    const int p = a + b - c, pa = std::abs(p - a), pb = std::abs(p - b), pc = std::abs(p - c);
    return static_cast<std::uint8_t>(pa <= pb && pa <= pc ? a : pb <= pc ? b : c);
}

// Undoes what made a row easier to compress; `before` is the row above, or zeros
void unfilter(int filter, std::uint8_t* row, const std::uint8_t* before, std::int64_t bytes, int pixel_bytes,
              const std::string& path) {
    if (filter > 4) refuse(path, "a row in it is filtered in no known way");
    for (std::int64_t i = 0; i < bytes; ++i) {
        const int a = i >= pixel_bytes ? row[i - pixel_bytes] : 0, b = before[i],
                  c = i >= pixel_bytes ? before[i - pixel_bytes] : 0;
        const int predicted = filter == 1   ? a
                              : filter == 2 ? b
                              : filter == 3 ? (a + b) / 2
                              : filter == 4 ? paeth(a, b, c)
                                            : 0;
        row[i] = static_cast<std::uint8_t>(row[i] + predicted);
    }
}

int sample(const Png& png, const std::uint8_t* row, std::int64_t index) {
    if (png.depth == 8) return row[index];
    if (png.depth == 16) return row[2 * index] << 8 | row[2 * index + 1];
    const std::int64_t bit = index * png.depth;
    return row[bit / 8] >> (8 - png.depth - bit % 8) & ((1 << png.depth) - 1);
}

// One pixel into its planes, which are `plane` floats apart
void put(const Png& png, const std::uint8_t* row, std::int64_t x, float* to, std::int64_t plane,
         const std::string& path) {
    if (png.colour == 3) {
        const auto at = static_cast<std::size_t>(3 * sample(png, row, x));
        if (at + 3 > png.palette.size()) refuse(path, "a pixel has no colour in its palette");
        for (int i = 0; i < 3; ++i) to[i * plane] = png.palette[at + static_cast<std::size_t>(i)];
    } else if (png.colour == 0) {
        const int value = sample(png, row, x);
        const int scale = png.depth == 2 ? 85 : png.depth == 4 ? 17 : 1;  // to 8 bits; single bits stay
        to[0] = static_cast<float>(value * scale);
    } else {
        for (int i = 0; i < png.samples(); ++i) {
            const int value = sample(png, row, x * png.samples() + i);
            to[i * plane] = static_cast<float>(png.depth == 16 ? value >> 8 : value);  // colours have 8 bits
        }
    }
}

struct Pass {
    std::uint32_t x, y, step_x, step_y;
};

}  // namespace

Volume read_png(const std::string& path) {
    const Png png = parse(path);
    const int channels = png.colour == 3 ? 3 : png.samples();
    const std::int64_t width = png.width, height = png.height;
    if (channels == 2) {
        throw ImageError(path + " has shape (" + std::to_string(height) + ", " + std::to_string(width) +
                         ", 2), expected (y, x) or (y, x, 3 or 4 channels)");
    }
    const std::int64_t claimed =
        product(product(width, height), channels * (png.depth == 16 && png.colour == 0 ? 2 : 1));
    check_claim(path, claimed, static_cast<std::int64_t>(png.packed.size()), kPictureRatio, kSmallBytes);
    std::vector<Pass> passes{{0, 0, 1, 1}};
    if (png.interlaced) {
        passes = {{0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4}, {0, 2, 2, 4}, {1, 0, 2, 2}, {0, 1, 1, 2}};
    }
    std::int64_t bytes = 0;
    for (const Pass& pass : passes) {
        const std::int64_t columns = (width - pass.x + pass.step_x - 1) / pass.step_x;
        const std::int64_t rows = (height - pass.y + pass.step_y - 1) / pass.step_y;
        if (width > pass.x && height > pass.y) bytes += rows * (1 + png.row_bytes(columns));
    }
    std::vector<std::uint8_t> filtered(static_cast<std::size_t>(bytes));
    libdeflate_decompressor* decompressor = libdeflate_alloc_decompressor();
    if (decompressor == nullptr) throw std::bad_alloc();
    std::size_t made = 0;
    const auto result = libdeflate_zlib_decompress(decompressor, png.packed.data(), png.packed.size(), filtered.data(),
                                                   filtered.size(), &made);
    libdeflate_free_decompressor(decompressor);
    if (result != LIBDEFLATE_SUCCESS || made != filtered.size())
        refuse(path, "its compressed data are damaged or truncated");

    Volume volume;
    volume.sizes_xyz = {width, height, 1};
    if (channels > 1) volume.sizes_xyz.push_back(channels);
    const std::int64_t plane = width * height;
    volume.voxels = new_floats(path, plane * channels);
    std::uint8_t* row = filtered.data();
    const int pixel_bytes = std::max(1, png.samples() * png.depth / 8);
    for (const Pass& pass : passes) {
        if (width <= pass.x || height <= pass.y) continue;
        const std::int64_t columns = (width - pass.x + pass.step_x - 1) / pass.step_x;
        const std::int64_t row_bytes = png.row_bytes(columns);
        const std::vector<std::uint8_t> zeros(static_cast<std::size_t>(row_bytes), 0);
        const std::uint8_t* before = zeros.data();
        for (std::int64_t y = pass.y; y < height; y += pass.step_y) {
            unfilter(row[0], row + 1, before, row_bytes, pixel_bytes, path);
            before = row + 1;
            for (std::int64_t x = 0; x < columns; ++x) {
                put(png, before, x, volume.voxels.get() + y * width + pass.x + x * pass.step_x, plane, path);
            }
            row += 1 + row_bytes;
        }
    }
    return volume;
}

void write_png(const std::string& path, const SmallestLabels& labels) {
    const Labels& small = labels.get();
    const std::int64_t height = small.shape_ZYX[1], width = small.shape_ZYX[2];
    const auto* bytes = static_cast<const std::uint8_t*>(small.voxels_ZYX);
    const auto* words = static_cast<const std::uint16_t*>(small.voxels_ZYX);
    std::vector<std::uint8_t> rows;
    for (std::int64_t y = 0; y < height; ++y) {
        rows.push_back(0);  // not filtered
        for (std::int64_t x = y * width; x < (y + 1) * width; ++x) {
            if (small.bytes == 2) rows.push_back(static_cast<std::uint8_t>(words[x] >> 8));
            rows.push_back(static_cast<std::uint8_t>(small.bytes == 2 ? words[x] & 0xff : bytes[x]));
        }
    }
    const auto voxel_bytes = static_cast<std::size_t>(small.bytes);
    const auto packed = deflated({}, rows.data(), rows.size(), Packing::zlib, voxel_bytes,
                                 static_cast<std::size_t>(width) * voxel_bytes + 1);
    std::vector<std::uint8_t> content(kSignature, kSignature + 8);
    const auto put_big = [&](std::uint32_t value) {
        for (int shift = 24; shift >= 0; shift -= 8) content.push_back(static_cast<std::uint8_t>(value >> shift));
    };
    const auto put_chunk = [&](const char* name, const std::vector<std::uint8_t>& data) {
        put_big(static_cast<std::uint32_t>(data.size()));
        const std::size_t start = content.size();
        content.insert(content.end(), name, name + 4);
        content.insert(content.end(), data.begin(), data.end());
        put_big(libdeflate_crc32(0, content.data() + start, content.size() - start));
    };
    std::vector<std::uint8_t> header;
    for (const std::int64_t size : {width, height}) {
        for (int shift = 24; shift >= 0; shift -= 8) header.push_back(static_cast<std::uint8_t>(size >> shift));
    }
    for (const int field : {8 * small.bytes, 0, 0, 0, 0}) header.push_back(static_cast<std::uint8_t>(field));
    put_chunk("IHDR", header);
    put_chunk("IDAT", packed);
    put_chunk("IEND", {});
    write_file(path, content);
}

}  // namespace fastnnunet::images
