// A folder in memory for files that are written anew for every input.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace fuzz {

class Scratch {
public:
    Scratch() {
        const std::filesystem::path memory = "/dev/shm";
        std::string pattern =
            (std::filesystem::exists(memory) ? memory : std::filesystem::temp_directory_path()) / "fuzz-XXXXXX";
        if (mkdtemp(pattern.data()) == nullptr) std::abort();
        folder_ = pattern;
    }
    ~Scratch() {
        std::error_code ignored;
        std::filesystem::remove_all(folder_, ignored);
    }

    const std::string& folder() const { return folder_; }

    std::string write(const std::string& name, const std::uint8_t* data, std::size_t size) const {
        const std::string path = folder_ + "/" + name;
        std::FILE* file = std::fopen(path.c_str(), "wb");
        if (file == nullptr || std::fwrite(data, 1, size, file) != size || std::fclose(file) != 0) std::abort();
        return path;
    }

private:
    std::string folder_;
};

}  // namespace fuzz
