// Values as the Python runtime's messages show them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fastnnunet::images {

// "%g"
std::string general(double value);

// As Python's repr: the shortest text that reads back as the same number
std::string repr(double value);

// Bytes as Python's repr: b'n+1\x00'
std::string repr_bytes(std::string_view bytes);

// "%.1f" of GiB
std::string gibibytes(double bytes);

template <class Range, class Format>
std::string joined(const Range& values, const Format& format) {
    std::string text;
    for (const auto& value : values) {
        if (!text.empty()) text += ", ";
        text += format(value);
    }
    return text;
}

// (1, 2, 3), and (1,) as Python writes a tuple of one
template <class Range>
std::string tuple_text(const Range& values) {
    std::string text;
    int count = 0;
    for (const auto& value : values) {
        if (count++ > 0) text += ", ";
        text += std::to_string(value);
    }
    return "(" + text + (count == 1 ? ",)" : ")");
}

std::string lowered(std::string text);
bool ends_with(std::string_view text, std::string_view ending);
std::string name_of(const std::string& path);    // without its folder
std::string folder_of(const std::string& path);  // "." where it has none, as pathlib's parent
bool is_folder(const std::string& path);

}  // namespace fastnnunet::images
