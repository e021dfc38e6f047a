// The bytes of an image file, inflated where they are compressed, and never more of them than its header says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace fastnnunet::images {

constexpr std::int64_t kDeflateRatio = 1032;         // deflate cannot make more than this out of a byte
constexpr std::int64_t kPictureRatio = 4096;         // above what the usual compressions of pictures do
constexpr std::int64_t kSmallBytes = 1 << 26;        // so large a picture may be made of any number of bytes
constexpr std::size_t kPaddingBytes = 4096;          // some writers fill the last block of a file with zeros
constexpr std::int64_t kMostBytes = INT64_MAX;       // what a product of sizes is where it overflows

enum class Packing { none, gzip, zlib };

// A regular file, read from where one likes.
class File {
public:
    // Throws ImageError when there is no such file, or it cannot be opened.
    explicit File(const std::string& path);

    const std::string& path() const { return path_; }
    std::int64_t size() const { return size_; }
    // The next bytes from `start`, fewer where the file ends. Throws ImageError.
    std::size_t read(std::int64_t start, void* into, std::size_t count);
    std::vector<std::uint8_t> read(std::int64_t start, std::size_t count);
    bool is_gzip();

private:
    struct Close {
        void operator()(std::FILE* file) const { std::fclose(file); }
    };
    std::string path_;
    std::unique_ptr<std::FILE, Close> file_;
    std::int64_t size_ = 0;
};

// What a file holds from byte `start` on. Compressed content is read into memory at once.
class Stored {
public:
    Stored(File& file, std::int64_t start, Packing packing);

    const std::string& path() const { return file_.path(); }
    bool packed() const { return packing_ != Packing::none; }
    std::int64_t stored_bytes() const { return stored_; }

    // The first `count` bytes (at most 4096) of the content, or what there is. Throws ImageError.
    std::vector<std::uint8_t> head(std::size_t count);

    // Puts the `skip` bytes of the content that come before its voxels, the `need` bytes of voxels and what follows
    // them into `into`, which has room for kPaddingBytes + 1 more. Throws ImageError when there are fewer voxels, or
    // something else than padding follows.
    void read(std::int64_t skip, std::int64_t need, std::uint8_t* into);

private:
    std::size_t inflate(std::uint8_t* into, std::size_t room, bool* overflowed);

    File& file_;
    std::int64_t start_, stored_;
    Packing packing_;
    std::vector<std::uint8_t> compressed_;
};

// a * b, or kMostBytes where that is too much; neither is negative
std::int64_t product(std::int64_t a, std::int64_t b);

// Throws ImageError when `stored_bytes`, compressed by `ratio` at best, cannot be what a header claims, or when this
// machine's memory cannot hold it. `slack`: bytes that need not be stored.
void check_claim(const std::string& path, std::int64_t claimed_bytes, std::int64_t stored_bytes, std::int64_t ratio = 1,
                 std::int64_t slack = 0);

// Throws the ImageError of an image that is too large for this machine, or for what it has left.
[[noreturn]] void refuse_memory(const std::string& what, std::int64_t needed_bytes);

// Memory for `count` floats, not touched, with at least `before` bytes ahead of them and `after` bytes behind, in both
// of which may be written. Throws ImageError, whose message is of `what`.
std::shared_ptr<float[]> new_floats(const std::string& what, std::int64_t count, std::int64_t before = 0,
                                    std::int64_t after = 0);


}  // namespace fastnnunet::images
