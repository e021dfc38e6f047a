#include "text_headers.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "image.hpp"
#include "text.hpp"

namespace fastnnunet::images {
namespace {

constexpr std::size_t kHeadBytes = 1 << 20;
constexpr std::int64_t kMostDigits = 18;

// What Python takes for white space in Latin-1
bool is_space(char c) {
    const auto code = static_cast<unsigned char>(c);
    return (code >= 9 && code <= 13) || (code >= 28 && code <= 32) || code == 0x85 || code == 0xa0;
}

bool to_number(const std::string& word, double* value) {
    const char* begin = word.c_str();
    if (*begin == '+') ++begin;
    if (*begin == '+' || (*begin == '-' && begin != word.c_str())) return false;
    const auto [end, error] = std::from_chars(begin, word.c_str() + word.size(), *value);
    // what is too small for a number is nothing, as elsewhere
    if (error == std::errc::result_out_of_range) *value = std::fabs(*value) < 1 ? 0 : HUGE_VAL;
    return error != std::errc::invalid_argument && end == word.c_str() + word.size() && begin != end;
}

}  // namespace

std::string trimmed(const std::string& text) {
    const auto begin = std::find_if_not(text.begin(), text.end(), is_space);
    const auto end = std::find_if_not(text.rbegin(), text.rend(), is_space).base();
    return begin < end ? std::string(begin, end) : "";
}

std::vector<std::string> words_of(const std::string& text) {
    std::vector<std::string> words;
    std::string word;
    for (const char c : text + ' ') {
        if (!is_space(c)) {
            word += c;
        } else if (!word.empty()) {
            words.push_back(std::move(word));
            word.clear();
        }
    }
    return words;
}

std::string utf8(const std::string& latin1) {
    std::string out;
    for (const char c : latin1) {
        const auto code = static_cast<unsigned char>(c);
        if (code < 0x80) {
            out += c;
        } else {
            out += static_cast<char>(0xc0 | (code >> 6));
            out += static_cast<char>(0x80 | (code & 0x3f));
        }
    }
    return out;
}

std::string exact(double value) {
    char text[40];
    std::snprintf(text, sizeof text, "%.17g", value);
    return text;
}

std::string beside(const std::string& path, const std::string& ending) {
    return path.substr(0, path.rfind('.')) + ending;
}

TextHeader::TextHeader(const std::string& path) : path_(path) {
    File file(path);
    const auto head = file.read(0, kHeadBytes);
    content_.assign(head.begin(), head.end());
    file_bytes_ = file.size();
}

bool TextHeader::line(std::string* text, bool* ended) {
    if (position_ >= content_.size()) return false;
    const std::size_t end = content_.find('\n', position_);
    *ended = end != std::string::npos;
    *text = content_.substr(position_, *ended ? end - position_ : std::string::npos);
    position_ = *ended ? end + 1 : content_.size();
    return true;
}

bool TextHeader::is_cut() const { return content_.size() >= kHeadBytes; }

void TextHeader::check_text() const {
    const std::size_t at = content_.find('\0');
    if (at < position_) damaged("byte " + std::to_string(at) + " of its text is zero");
}

std::string TextHeader::get(const std::string& name, const std::string& otherwise) const {
    const auto found = fields.find(name);
    return found == fields.end() ? otherwise : found->second;
}

void TextHeader::damaged(const std::string& what) const {
    throw ImageError(path_ + " has a damaged header: " + utf8(what) + "; export it again");
}

std::int64_t TextHeader::whole(const std::string& name, const std::string& text) const {
    const std::string digits = trimmed(text);
    const std::size_t sign = !digits.empty() && (digits[0] == '+' || digits[0] == '-');
    const bool is_whole = std::all_of(digits.begin() + sign, digits.end(), [](char c) { return c >= '0' && c <= '9'; });
    const auto count = static_cast<std::int64_t>(digits.size() - sign);
    if (!is_whole || count < 1 || count > kMostDigits) {
        damaged(name + " = " + (text.empty() ? "nothing" : text.substr(0, 60)));
    }
    const std::int64_t value = std::stoll(digits.substr(sign));
    return digits[0] == '-' ? -value : value;
}

std::vector<std::int64_t> TextHeader::sizes(const std::string& name, const std::string& text, std::int64_t axes) const {
    std::vector<std::int64_t> out;
    for (const std::string& word : words_of(text)) out.push_back(whole(name, word));
    const bool positive = std::all_of(out.begin(), out.end(), [](std::int64_t size) { return size >= 1; });
    if (static_cast<std::int64_t>(out.size()) != axes || !positive) {
        damaged(name + " = " + text.substr(0, 60) + " of " + std::to_string(axes) + " dimension(s)");
    }
    return out;
}

std::vector<double> TextHeader::numbers(const std::string& name, const std::vector<std::string>& words,
                                        std::size_t count) const {
    std::vector<double> values;
    bool is_good = count == 0 || words.size() == count;
    for (const std::string& word : words) {
        double value = 0;
        is_good = is_good && to_number(trimmed(word), &value) && std::isfinite(value);
        values.push_back(value);
    }
    if (!is_good) {
        std::string text;
        for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
        damaged(name + " = " + text.substr(0, 60));
    }
    return values;
}

Volume read_placed(const TextHeader& header, const Place& place, const std::vector<std::int64_t>& sizes_xyz,
                   const Layout& layout) {
    const std::string& path = header.path();
    const bool is_detached = !place.data_file.empty();
    std::string data = path;
    if (is_detached) {
        namespace fs = std::filesystem;
        data = (fs::u8path(path).parent_path() / fs::u8path(utf8(place.data_file))).u8string();
        std::error_code failed;
        if (!fs::is_regular_file(fs::u8path(data), failed)) {
            throw ImageError(path + ": its voxels are in " + data + ", which is missing; copy it beside the header");
        }
    }
    File file(data);
    const std::int64_t header_bytes = is_detached ? 0 : static_cast<std::int64_t>(header.position());
    const std::int64_t stored = file.size() - header_bytes;
    const std::int64_t need = product(count_of(sizes_xyz), bytes_of(layout.kind));
    const bool is_packed = place.packing != Packing::none;
    check_claim(path, need, stored, is_packed ? kDeflateRatio : 1);
    if (place.packed_bytes >= 0 && place.packed_bytes != stored) {
        header.damaged("CompressedDataSize = " + std::to_string(place.packed_bytes) + ", of which " +
                       std::to_string(stored) + " bytes are there");
    }
    if (place.skip != 0 && (is_packed || !is_detached)) {
        throw ImageError(path + ": bytes are to be skipped before its voxels, which this engine does only in files of "
                         "voxels alone; convert it first");
    }
    const std::int64_t start = header_bytes + (place.skip < 0 ? stored - need : place.skip);
    Stored voxels(file, start, place.packing);
    return read_volume(voxels, 0, sizes_xyz, layout);
}

void check_one_file(const std::string& path, const std::string& data_file) {
    const auto words = words_of(data_file);
    if ((!words.empty() && words[0] == "LIST") || (data_file.find('%') != std::string::npos && words.size() >= 3)) {
        throw ImageError(path + " has its voxels in several files, which this engine does not read; convert it first");
    }
}

void check_axes(const std::string& path, std::int64_t axes) {
    if (axes < 2 || axes > 4) {
        throw ImageError(path + " has " + std::to_string(axes) + " dimensions, expected a scalar image of 2 or 3 "
                         "dimensions, or 4 where the last is the channel");
    }
}

}  // namespace fastnnunet::images
