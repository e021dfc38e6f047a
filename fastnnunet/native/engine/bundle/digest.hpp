// SHA-256, with the processor's instructions for it where it has them.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace fastnnunet::engine {

std::string sha256_hex(const void* bytes, std::size_t count);
std::string sha256_hex_plainly(const void* bytes, std::size_t count);  // without those instructions
inline std::string sha256_hex(std::string_view text) { return sha256_hex(text.data(), text.size()); }

}  // namespace fastnnunet::engine
