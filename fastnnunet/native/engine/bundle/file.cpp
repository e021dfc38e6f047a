#include "bundle/file.hpp"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "error.hpp"

namespace fastnnunet::engine {

MappedFile::MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    if (file < 0 || fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
        const std::string reason = std::strerror(errno);
        if (file >= 0) close(file);
        throw NotFoundError("cannot read " + path + ": " + reason);
    }
    size_ = static_cast<std::size_t>(status.st_size);
    if (size_ > 0) {
        void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
        if (data == MAP_FAILED) {
            const std::string reason = std::strerror(errno);
            close(file);
            throw NotFoundError("cannot read " + path + ": " + reason);
        }
        data_ = data;
    }
    close(file);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) munmap(const_cast<void*>(data_), size_);
}

bool is_regular_file(const std::string& path) {
    struct stat status {};
    return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

bool is_link(const std::string& path) {
    struct stat status {};
    return lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode);
}

bool is_folder(const std::string& path) {
    struct stat status {};
    return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

std::string joined(const std::string& folder, const std::string& name) {
    return (std::filesystem::path(folder) / name).string();
}

std::string local_home() {
    const auto variable = [](const char* name) -> std::string {
        const char* value = std::getenv(name);
        return value == nullptr ? "" : value;
    };
    const std::string home = variable("HOME");
    if (std::string own = variable("FASTNNUNET_CACHE_HOME"); !own.empty()) {
        if (own.rfind("~/", 0) == 0) own = home + own.substr(1);
        return std::filesystem::absolute(own).string();
    }
    const std::string cache = variable("XDG_CACHE_HOME");
    return joined(cache.empty() ? joined(home, ".cache") : cache, "fastnnunet");
}

std::int64_t memory_bytes() {
    std::int64_t least = std::int64_t{1} << 62;
    const long page = sysconf(_SC_PAGE_SIZE), pages = sysconf(_SC_PHYS_PAGES);
    if (page > 0 && pages > 0) least = std::min(least, static_cast<std::int64_t>(page) * pages);
    std::ifstream limit("/sys/fs/cgroup/memory.max");
    std::int64_t bytes = 0;
    if (limit >> bytes) least = std::min(least, bytes);  // "max" where there is none
    return least;
}

int available_cores() {
#if defined(__linux__)
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) == 0) return std::max(1, CPU_COUNT(&cores));
#endif
    return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

}  // namespace fastnnunet::engine
