// A file's bytes, mapped into memory where the system can.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace fastnnunet::engine {

class MappedFile {
public:
    explicit MappedFile(const std::string& path);  // throws NotFoundError
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

private:
    const void* data_ = nullptr;
    std::size_t size_ = 0;
};

bool is_regular_file(const std::string& path);  // also through a link
bool is_link(const std::string& path);
bool is_folder(const std::string& path);
std::string joined(const std::string& folder, const std::string& name);
// `$FASTNNUNET_CACHE_HOME`, else `fastnnunet` in the user's cache folder
std::string local_home();
// Physical memory of this machine, or of this container
std::int64_t memory_bytes();
// Cores this process may use
int available_cores();

}  // namespace fastnnunet::engine
