#include "stored.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <new>

#include "image.hpp"
#include "libdeflate.h"
#include "text.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fastnnunet::images {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostHead = 4096;
// A stored block of deflate is not begun unless it fits, nor is a match: as much room as the longest of them takes
constexpr std::size_t kHeadRoom = 65535 + 258 + kMostHead;

struct FreeDecompressor {
    void operator()(libdeflate_decompressor* d) const { libdeflate_free_decompressor(d); }
};

// Physical memory of this machine, or of this container; no limit where the system does not tell
std::int64_t memory_bytes() {
    std::int64_t limit = std::int64_t{1} << 62;
#ifdef _SC_PHYS_PAGES
    const std::int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    if (pages > 0 && page > 0) limit = std::min(limit, product(pages, page));
#endif
    std::ifstream group("/sys/fs/cgroup/memory.max");
    std::int64_t bytes = 0;
    if (group >> bytes && bytes > 0) limit = std::min(limit, bytes);  // "max" where there is none
    return limit;
}

std::string system_text(int error) { return "[Errno " + std::to_string(error) + "] " + std::strerror(error); }

int seek(std::FILE* file, std::int64_t to) {
#ifdef _WIN32
    return _fseeki64(file, to, SEEK_SET);
#else
    return fseeko(file, to, SEEK_SET);
#endif
}

std::FILE* open_to_read(const fs::path& path) {
#ifdef _WIN32
    return _wfopen(path.c_str(), L"rb");
#else
    return std::fopen(path.c_str(), "rb");
#endif
}

}  // namespace

File::File(const std::string& path) : path_(path) {
    const fs::path place = fs::u8path(path);
    std::error_code failed;
    const fs::file_status status = fs::status(place, failed);
    if (!fs::is_regular_file(status)) {  // a pipe or a device would never end
        throw ImageError(fs::exists(status) ? path + " is not a regular file" : "image not found: " + path);
    }
    errno = 0;
    file_.reset(open_to_read(place));
    if (!file_) throw ImageError("cannot read " + path + ": " + system_text(errno));
    std::setvbuf(file_.get(), nullptr, _IONBF, 0);  // read in large pieces only
    const auto size = fs::file_size(place, failed);
    if (failed) throw ImageError("cannot read " + path + ": " + failed.message());
    size_ = static_cast<std::int64_t>(std::min<std::uintmax_t>(size, kMostBytes));
}

std::size_t File::read(std::int64_t start, void* into, std::size_t count) {
    if (start >= size_ || count == 0) return 0;
    if (seek(file_.get(), start) != 0) throw ImageError("cannot read " + path_ + ": " + system_text(errno));
    std::clearerr(file_.get());
    const std::size_t got = std::fread(into, 1, count, file_.get());
    if (std::ferror(file_.get())) throw ImageError("cannot read " + path_ + ": " + system_text(errno));
    return got;
}

std::vector<std::uint8_t> File::read(std::int64_t start, std::size_t count) {
    const std::int64_t left = std::max<std::int64_t>(0, size_ - start);
    std::vector<std::uint8_t> bytes;
    try {
        bytes.resize(std::min<std::uint64_t>(count, static_cast<std::uint64_t>(left)));
    } catch (const std::bad_alloc&) {
        refuse_memory(path_, left);
    }
    bytes.resize(read(start, bytes.data(), bytes.size()));
    return bytes;
}

bool File::is_gzip() {
    std::uint8_t magic[2] = {};
    return read(0, magic, 2) == 2 && magic[0] == 0x1f && magic[1] == 0x8b;
}

Stored::Stored(File& file, std::int64_t start, Packing packing)
    : file_(file), start_(start), stored_(std::max<std::int64_t>(0, file.size() - start)), packing_(packing) {
    if (packed()) compressed_ = file.read(start, static_cast<std::size_t>(stored_));
}

std::vector<std::uint8_t> Stored::head(std::size_t count) {
    count = std::min(count, kMostHead);
    if (!packed()) return file_.read(start_, count);
    std::vector<std::uint8_t> room(kHeadRoom);
    bool overflowed = false;
    const std::size_t got = inflate(room.data(), room.size(), &overflowed);
    room.resize(std::min(count, overflowed ? count : got));
    return room;
}

void Stored::read(std::int64_t skip, std::int64_t need, std::uint8_t* into) {
    bool overflowed = false;
    std::int64_t got = 0, rest = 0;
    const std::uint8_t* padding = into + skip + need;
    if (packed()) {
        const auto whole = static_cast<std::int64_t>(
            inflate(into, static_cast<std::size_t>(skip + need) + kPaddingBytes + 1, &overflowed));
        got = std::clamp<std::int64_t>(whole - skip, 0, need);
        rest = std::max<std::int64_t>(0, whole - skip - need);
    } else {
        got = static_cast<std::int64_t>(file_.read(start_ + skip, into + skip, static_cast<std::size_t>(need)));
        rest = static_cast<std::int64_t>(file_.read(start_ + skip + need, into + skip + need, kPaddingBytes + 1));
    }
    if (got < need && !overflowed) {
        throw ImageError(path() + " is truncated: got " + std::to_string(got) + " bytes of voxels, expected " +
                         std::to_string(need) + "; copy or export it again");
    }
    const bool is_padding = rest <= static_cast<std::int64_t>(kPaddingBytes) &&
                            std::all_of(padding, padding + rest, [](std::uint8_t byte) { return byte == 0; });
    if (overflowed || !is_padding) {
        throw ImageError(path() + " is damaged: more data follow than the " + std::to_string(need) +
                         " bytes of voxels of its header; copy or export it again");
    }
}

// As much of the content as there is room for. libdeflate writes nothing beyond the room, and stops where it is full.
std::size_t Stored::inflate(std::uint8_t* into, std::size_t room, bool* overflowed) {
    const std::unique_ptr<libdeflate_decompressor, FreeDecompressor> decompressor(libdeflate_alloc_decompressor());
    if (!decompressor) throw std::bad_alloc();
    const std::uint8_t* in = compressed_.data();
    const std::uint8_t* const end = in + compressed_.size();
    std::size_t got = 0;
    while (true) {
        std::size_t taken = 0, made = 0;
        const auto left = static_cast<std::size_t>(end - in);
        const auto inflate_one =
            packing_ == Packing::gzip ? libdeflate_gzip_decompress_ex : libdeflate_zlib_decompress_ex;
        const auto result = inflate_one(decompressor.get(), in, left, into + got, room - got, &taken, &made);
        if (result == LIBDEFLATE_INSUFFICIENT_SPACE) {
            *overflowed = true;
            return room;
        }
        if (result != LIBDEFLATE_SUCCESS) {
            throw ImageError(path() +
                             " is damaged or truncated (its compressed data are no whole stream, or have another "
                             "checksum); copy or export it again");
        }
        in += taken;
        got += made;
        while (in != end && *in == 0) ++in;  // zeros between and behind the members of a file are padding
        if (in == end) return got;
        if (packing_ != Packing::gzip || end - in < 2 || in[0] != 0x1f || in[1] != 0x8b) {
            throw ImageError(path() +
                             " is damaged: something else follows its compressed data; copy or export it again");
        }
    }
}

std::int64_t product(std::int64_t a, std::int64_t b) {
    return b != 0 && a > kMostBytes / b ? kMostBytes : a * b;
}

void check_claim(const std::string& path, std::int64_t claimed_bytes, std::int64_t stored_bytes, std::int64_t ratio,
                 std::int64_t slack) {
    const std::int64_t most = product(stored_bytes, ratio);
    if (most < kMostBytes - slack && claimed_bytes > most + slack) {
        throw ImageError(path + " is truncated or its header is damaged: it claims " + std::to_string(claimed_bytes) +
                         " bytes of voxels, expected at most " + std::to_string(most + slack) + " in " +
                         std::to_string(stored_bytes) + " stored bytes; copy or export it again");
    }
    if (claimed_bytes > memory_bytes()) refuse_memory(path, claimed_bytes);
}

void refuse_memory(const std::string& what, std::int64_t needed_bytes) {
    throw ImageError(what + " does not fit into memory: " + gibibytes(static_cast<double>(needed_bytes)) +
                     " GiB of voxels, this machine has " + gibibytes(static_cast<double>(memory_bytes())) +
                     " GiB; crop or resample it first");
}

std::shared_ptr<float[]> new_floats(const std::string& what, std::int64_t count, std::int64_t before,
                                    std::int64_t after) {
    constexpr std::int64_t kAlignment = 64;
    before = (before + kAlignment - 1) / kAlignment * kAlignment;
    const std::int64_t bytes = product(count, sizeof(float));
    if (bytes > memory_bytes()) refuse_memory(what, bytes);
    const std::int64_t whole = bytes + before + after + kAlignment;
    auto* memory = new (std::nothrow) std::uint8_t[static_cast<std::size_t>(whole)];
    if (memory == nullptr) refuse_memory(what, bytes);
    const std::shared_ptr<std::uint8_t[]> owner(memory);
    void* place = memory + before;
    std::size_t room = static_cast<std::size_t>(whole - before);
    std::align(kAlignment, static_cast<std::size_t>(bytes), place, room);
    return std::shared_ptr<float[]>(owner, static_cast<float*>(place));
}

}  // namespace fastnnunet::images
