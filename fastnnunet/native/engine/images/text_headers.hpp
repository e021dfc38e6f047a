// NRRD and MetaImage files: read from the text that they begin with, which is refused unless all that matters is well
// formed and the voxels are there.
// Formats: https://teem.sourceforge.net/nrrd/format.html, https://itk.org/Wiki/ITK/MetaIO/Documentation
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "grid.hpp"
#include "itk_files.hpp"

namespace fastnnunet::images {

// By the ending of the name
bool is_metaimage(const std::string& path);
bool is_nrrd(const std::string& path);

// Throw ImageError.
ItkFile read_metaimage(const std::string& path);
ItkFile read_nrrd(const std::string& path);
void write_metaimage(const std::string& path, const Grid& grid, const std::vector<std::int64_t>& sizes_xyz,
                     const SmallestLabels& labels);
void write_nrrd(const std::string& path, const Grid& grid, const std::vector<std::int64_t>& sizes_xyz,
                const SmallestLabels& labels);

// The text before the voxels
class TextHeader {
public:
    explicit TextHeader(const std::string& path);  // reads the begin of the file

    const std::string& path() const { return path_; }
    // The next line without its end; false where there is none. `ended`: whether it has an end.
    bool line(std::string* text, bool* ended);
    std::size_t position() const { return position_; }
    bool is_cut() const;  // whether there is more of the file than was read
    void check_text() const;  // that no byte of what was read so far is zero

    std::map<std::string, std::string> fields;
    bool has(const std::string& name) const { return fields.count(name) > 0; }
    std::string get(const std::string& name, const std::string& otherwise = "") const;

    [[noreturn]] void damaged(const std::string& what) const;
    // Numbers of a text; damaged where it is none, or not as many as expected (any where `count` is 0)
    std::int64_t whole(const std::string& name, const std::string& text) const;
    std::vector<std::int64_t> sizes(const std::string& name, const std::string& text, std::int64_t axes) const;
    std::vector<double> numbers(const std::string& name, const std::vector<std::string>& words,
                                std::size_t count) const;

private:
    std::string path_, content_;
    std::size_t position_ = 0;
    std::int64_t file_bytes_ = 0;
};

// Where the voxels are, as the header says it
struct Place {
    std::string data_file;                  // empty: behind the header
    std::int64_t skip = 0;                  // bytes before the voxels; -1: they are at the end of the file
    Packing packing = Packing::none;
    std::int64_t packed_bytes = -1;         // as the header says them; -1: it does not
};

// The voxels, with the sizes and the kind of the header. Throws ImageError.
Volume read_placed(const TextHeader& header, const Place& place, const std::vector<std::int64_t>& sizes_xyz,
                   const Layout& layout);

std::string trimmed(const std::string& text);
std::string utf8(const std::string& latin1);  // as messages and names of files have a header's text
std::vector<std::string> words_of(const std::string& text);

// Throws ImageError where the name of the data's file stands for several.
void check_one_file(const std::string& path, const std::string& data_file);

// Throws ImageError where an image of so many axes is none of two or three, or of channels of three.
void check_axes(const std::string& path, std::int64_t axes);
std::string exact(double value);  // "%.17g"
// `image.mhd` -> `image` + ending: the name of the file beside a header
std::string beside(const std::string& path, const std::string& ending);

}  // namespace fastnnunet::images
