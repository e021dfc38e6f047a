#include "text.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>

namespace fastnnunet::images {

std::string general(double value) {
    if (std::isnan(value)) return "nan";
    char text[40];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
}

std::string repr(double value) {
    if (!std::isfinite(value)) return general(value);
    char text[400];  // the longest that is not written with an exponent
    const double size = std::fabs(value);
    const bool plain = size == 0 || (size >= 1e-4 && size < 1e16);
    const auto end = std::to_chars(text, text + sizeof text, value,
                                   plain ? std::chars_format::fixed : std::chars_format::scientific).ptr;
    std::string out(text, end);
    if (plain && out.find('.') == std::string::npos) out += ".0";
    return out;
}

std::string repr_bytes(std::string_view bytes) {
    std::string out = "b'";
    for (const char c : bytes) {
        const auto code = static_cast<unsigned char>(c);
        if (c == '\\' || c == '\'') {
            out += '\\';
            out += c;
        } else if (code >= 32 && code < 127) {
            out += c;
        } else if (c == '\n') {
            out += "\\n";
        } else if (c == '\r') {
            out += "\\r";
        } else if (c == '\t') {
            out += "\\t";
        } else {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\x%02x", code);
            out += escaped;
        }
    }
    return out + "'";
}

std::string gibibytes(double bytes) {
    char text[64];
    std::snprintf(text, sizeof text, "%.1f", bytes / 1073741824.0);
    return text;
}

std::string lowered(std::string text) {
    for (char& c : text) {
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    }
    return text;
}

bool ends_with(std::string_view text, std::string_view ending) {
    return text.size() >= ending.size() && text.substr(text.size() - ending.size()) == ending;
}

std::string name_of(const std::string& path) { return std::filesystem::u8path(path).filename().u8string(); }

std::string folder_of(const std::string& path) {
    const std::string folder = std::filesystem::u8path(path).parent_path().u8string();
    return folder.empty() ? "." : folder;
}

bool is_folder(const std::string& path) {
    std::error_code failed;
    return std::filesystem::is_directory(std::filesystem::u8path(path), failed);
}

}  // namespace fastnnunet::images
