// A server on standard input for the tests: one request a line, fields with tabs between, one answer of JSON a line.
//   read READER VOXELS_OUT FILE...      reads an image; its float32 voxels go to VOXELS_OUT
//   segmentation READER VOXELS_OUT FILE
//   series READER VOXELS_OUT UID FOLDER
//   write READER TYPE LABELS OUT FILE   reads FILE, writes the raw labels (uint8 or uint16) of LABELS with its geometry
#include <cstdio>
#include <ctime>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "images/image.hpp"

namespace {

using namespace fastnnunet::images;

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        char escaped[8];
        if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < 32) {
            std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned char>(c));
            out += escaped;
        } else {
            out += c;
        }
    }
    return out + "\"";
}

std::string described(const Image& image, double seconds) {
    std::ostringstream out;
    out.precision(17);
    out << "{\"shape\": [";
    for (int i = 0; i < 4; ++i) out << (i ? ", " : "") << image.shape_CZYX[i];
    out << "], \"spacing\": [";
    for (int i = 0; i < 3; ++i) out << (i ? ", " : "") << image.spacing_ZYX[i];
    out << "], \"warnings\": [";
    for (std::size_t i = 0; i < image.warnings.size(); ++i) out << (i ? ", " : "") << quoted(image.warnings[i]);
    out << "], \"seconds\": " << seconds << "}";
    return out.str();
}

std::string answer(const std::vector<std::string>& words) {
    const auto seconds = [] { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; };  // of processor time
    const double begin = seconds();
    if (words[0] == "write") {
        const Image image = read_image({words.begin() + 5, words.end()}, words[1]);
        std::ifstream file(words[3], std::ios::binary);
        const std::string raw{std::istreambuf_iterator<char>(file), {}};
        const std::array<std::int64_t, 3> shape{image.shape_CZYX[1], image.shape_CZYX[2], image.shape_CZYX[3]};
        const auto start = seconds();
        if (words[2] == "uint8") {
            write_labels(words[4], {reinterpret_cast<const std::uint8_t*>(raw.data()), shape}, *image.header);
        } else {
            std::vector<std::uint16_t> labels(raw.size() / 2);
            std::copy(raw.begin(), raw.end(), reinterpret_cast<char*>(labels.data()));
            write_labels(words[4], {labels.data(), shape}, *image.header);
        }
        return described(image, seconds() - start);
    }
    ReadOptions options;
    if (words[0] == "series") options.series_uid = words[3];
    const Image image = words[0] == "segmentation" ? read_segmentation(words[3], words[1])
                        : words[0] == "series"     ? read_image({words[4]}, words[1], options)
                                                   : read_image({words.begin() + 3, words.end()}, words[1]);
    const double taken = seconds() - begin;
    if (words[2] != "-") {
        std::ofstream out(words[2], std::ios::binary);
        out.write(reinterpret_cast<const char*>(image.voxels_CZYX.get()), image.size() * 4);
    }
    return described(image, taken);
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        std::vector<std::string> words;
        std::istringstream fields(line);
        for (std::string word; std::getline(fields, word, '\t');) words.push_back(word);
        std::string text;
        try {
            text = answer(words);
        } catch (const ImageError& error) {
            text = "{\"refused\": " + quoted(error.what()) + "}";
        }
        std::cout << text << std::endl;
    }
}
