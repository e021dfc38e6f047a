#include "reader.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <random>
#include <thread>

#include "deflate.hpp"
#include "text.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace fastnnunet::images {
namespace {

namespace fs = std::filesystem;

// numpy.allclose as the Python runtime calls it
bool all_close(const std::vector<double>& a, const std::vector<double>& b) {
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (!(std::fabs(a[i] - b[i]) <= 1e-6 + 1e-5 * std::fabs(b[i]))) return false;
    }
    return true;
}

// Sizes (z, y, x) of a file, and how many channels it holds
std::vector<std::int64_t> shape_of(const Channel& channel) {
    std::vector<std::int64_t> sizes = channel.volume.sizes_xyz;
    if (channel.has_channels) sizes.pop_back();
    sizes.resize(3, 1);
    return {sizes[2], sizes[1], sizes[0]};
}

std::int64_t channels_of(const Channel& channel) { return channel.has_channels ? channel.volume.sizes_xyz.back() : 1; }

// Another place or direction is nnU-Net's warning.
void check_same(const std::vector<std::string>& paths, const std::vector<Channel>& channels,
                std::vector<std::string>* warnings) {
    const Channel& first = channels[0];
    const auto shape = shape_of(first);
    for (std::size_t i = 1; i < channels.size(); ++i) {
        const auto differ = [&](const std::string& name, const std::string& one, const std::string& other) {
            return "the channels do not fit together: " + name + " is " + one + " in " + name_of(paths[0]) + " and " +
                   other + " in " + name_of(paths[i]);
        };
        const std::string mend = "\nresample them to the same grid first (folder " + folder_of(paths[0]) + ")";
        if (shape_of(channels[i]) != shape) {
            throw ImageError(differ("shape", tuple_text(shape), tuple_text(shape_of(channels[i]))) + mend);
        }
        for (std::size_t k = 0; k < first.shared.size(); ++k) {
            const Shared &one = first.shared[k], &other = channels[i].shared[k];
            if (all_close(one.values, other.values)) continue;
            const std::string text = differ(one.name, one.text, other.text);
            if (one.name == "spacing") throw ImageError(text + mend);
            warnings->push_back(text + "; the first one is used");
        }
    }
}

[[noreturn]] void cannot_write(const std::string& path, int error) {
    if (error == ENOSPC || error == EFBIG
#ifdef EDQUOT
        || error == EDQUOT
#endif
    ) {
        throw WriteError("no room left to write " + path + " (" + std::strerror(error) +
                         "); free some space, or raise the limit (quota, ulimit -f), and run again");
    }
    throw WriteError("cannot write " + path + ": [Errno " + std::to_string(error) + "] " + std::strerror(error));
}

// A new file beside `path`, of this call alone
fs::path sibling(const fs::path& path) {
    static std::atomic<unsigned> count{0};
    std::random_device random;
    char name[64];
    std::snprintf(name, sizeof name, ".partial-%08x%08x%08x", random(), random(), count.fetch_add(1));
    return path.parent_path() / name;
}

}  // namespace

Image read_channels(const std::vector<std::string>& paths, int threads,
                    const std::function<Channel(const std::string&)>& read_one) {
    if (paths.empty()) throw ImageError("an image has no files, expected one for each channel");
    std::vector<Channel> channels(paths.size());
    std::vector<std::exception_ptr> failures(paths.size());
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t i = next++; i < paths.size(); i = next++) {
            try {
                channels[i] = read_one(paths[i]);
            } catch (...) {
                failures[i] = std::current_exception();
            }
        }
    };
    const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
    const std::size_t wanted = std::min<std::size_t>(threads > 0 ? threads : cores, paths.size());
    std::vector<std::thread> crew;
    for (std::size_t i = 1; i < wanted; ++i) crew.emplace_back(work);
    work();
    for (std::thread& thread : crew) thread.join();
    for (const std::exception_ptr& failure : failures) {
        if (failure) std::rethrow_exception(failure);
    }

    Image image;
    for (const Channel& channel : channels) {
        image.warnings.insert(image.warnings.end(), channel.warnings.begin(), channel.warnings.end());
    }
    check_same(paths, channels, &image.warnings);
    const auto shape = shape_of(channels[0]);
    std::int64_t count = 0, bad = 0;
    for (const Channel& channel : channels) {
        count += channels_of(channel);
        bad += channel.volume.bad;
    }
    image.shape_CZYX = {count, shape[0], shape[1], shape[2]};
    image.spacing_ZYX = channels[0].spacing_ZYX;
    image.header = channels[0].header;
    if (bad > 0) {
        throw ImageError(joined(paths, name_of) + ": " + std::to_string(bad) + " of " + std::to_string(image.size()) +
                         " voxels are NaN or infinite, expected numbers; repair the image (folder " +
                         folder_of(paths[0]) + ")");
    }
    if (channels.size() == 1) {
        image.voxels_CZYX = std::move(channels[0].volume.voxels);
        return image;
    }
    image.voxels_CZYX = new_floats(paths[0], image.size());
    float* to = image.voxels_CZYX.get();
    for (Channel& channel : channels) {
        const std::int64_t size = channel.volume.size();
        std::memcpy(to, channel.volume.voxels.get(), static_cast<std::size_t>(size) * sizeof(float));
        channel.volume.voxels.reset();
        to += size;
    }
    return image;
}

Labels::Labels(const std::uint8_t* voxels, const std::array<std::int64_t, 3>& shape)
    : voxels_ZYX(voxels), bytes(1), shape_ZYX(shape) {}

Labels::Labels(const std::uint16_t* voxels, const std::array<std::int64_t, 3>& shape)
    : voxels_ZYX(voxels), bytes(2), shape_ZYX(shape) {}

namespace {

template <class T>
unsigned largest_of(const T* voxels, std::int64_t size) {
    T largest = 0;
    for (std::int64_t i = 0; i < size; ++i) largest = std::max(largest, voxels[i]);
    return largest;
}

}  // namespace

SmallestLabels::SmallestLabels(const Labels& labels) : labels_(labels) {
    const std::int64_t size = labels.size();
    const auto* bytes = static_cast<const std::uint8_t*>(labels.voxels_ZYX);
    const auto* words = static_cast<const std::uint16_t*>(labels.voxels_ZYX);
    const unsigned largest = labels.bytes == 1 ? largest_of(bytes, size) : largest_of(words, size);
    const int wanted = largest < 255 ? 1 : 2;
    if (wanted == labels.bytes) return;
    other_.resize(static_cast<std::size_t>(size * wanted));
    for (std::int64_t i = 0; i < size; ++i) {
        if (wanted == 1) {
            other_[i] = static_cast<std::uint8_t>(words[i]);
        } else {
            const std::uint16_t word = bytes[i];
            std::memcpy(other_.data() + 2 * i, &word, 2);
        }
    }
    labels_.voxels_ZYX = other_.data();
    labels_.bytes = wanted;
}

std::vector<std::uint8_t> SmallestLabels::bytes_after(const std::vector<std::uint8_t>& header, Packing packing) const {
    const auto size = static_cast<std::size_t>(labels_.size() * labels_.bytes);
    const auto* from = static_cast<const std::uint8_t*>(labels_.voxels_ZYX);
    std::vector<std::uint8_t> swapped;
    const std::uint16_t one = 1;
    std::uint8_t first;
    std::memcpy(&first, &one, 1);
    if (first == 0 && labels_.bytes == 2) {  // a machine with the highest byte first
        swapped.assign(from, from + size);
        for (std::size_t i = 0; i < size; i += 2) std::swap(swapped[i], swapped[i + 1]);
        from = swapped.data();
    }
    if (packing != Packing::none) {
        const auto voxel_bytes = static_cast<std::size_t>(labels_.bytes);
        return deflated(header, from, size, packing, voxel_bytes,
                        voxel_bytes * static_cast<std::size_t>(labels_.shape_ZYX[2]));
    }
    std::vector<std::uint8_t> out;
    out.reserve(header.size() + size);
    out.insert(out.end(), header.begin(), header.end());
    out.insert(out.end(), from, from + size);
    return out;
}

void write_file(const std::string& path, const std::vector<std::uint8_t>& content) {
    const fs::path place = fs::u8path(path), partial = sibling(place);
    errno = 0;
#ifdef _WIN32
    std::FILE* file = _wfopen(partial.c_str(), L"wbx");
#else
    std::FILE* file = std::fopen(partial.c_str(), "wbx");
#endif
    if (file == nullptr) cannot_write(path, errno);
    std::setvbuf(file, nullptr, _IONBF, 0);
    const bool is_whole = std::fwrite(content.data(), 1, content.size(), file) == content.size();
    int error = is_whole ? 0 : errno;
    if (std::fclose(file) != 0 && error == 0) error = errno;
    std::error_code failed;
    if (error == 0) fs::rename(partial, place, failed);
    if (error == 0 && !failed) return;
    std::error_code ignored;  // what is said is why it could not be written
    fs::remove(partial, ignored);
    cannot_write(path, error != 0 ? error : failed.value());
}

}  // namespace fastnnunet::images
