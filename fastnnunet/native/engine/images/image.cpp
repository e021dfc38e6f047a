#include "image.hpp"

#include <filesystem>
#include <new>

#include "reader.hpp"
#include "text.hpp"

namespace fastnnunet::images {
namespace {

const std::vector<std::pair<std::string, Reader>>& readers() {
    static const std::vector<std::pair<std::string, Reader>> known{
        {"SimpleITKIO", sitk_reader(false)},
        {"SimpleITKIOWithReorient", sitk_reader(true)},
        {"NibabelIO", nibabel_reader(false)},
        {"NibabelIOWithReorient", nibabel_reader(true)},
        {"NaturalImage2DIO", natural_reader()},
    };
    return known;
}

const Reader& find(const std::string& name) {
    for (const auto& [known, reader] : readers()) {
        if (known == name) return reader;
    }
    throw ImageError("the model's image reader is '" + name + "', which this engine does not have; known: " +
                     known_readers() + "\nread the images yourself and predict the array");
}

// What a standard library throws of an image is its image's error.
template <class Work>
auto as_image_error(const std::string& verb, const std::string& path, const Work& work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        throw ImageError("cannot " + verb + " " + path +
                         ": this machine has not enough memory left; close other programs, "
                         "or crop the image first");
    } catch (const std::filesystem::filesystem_error& error) {
        throw ImageError("cannot " + verb + " " + path + ": " + error.code().message());
    }
}

}  // namespace

bool has_reader(const std::string& reader) {
    for (const auto& entry : readers()) {
        if (entry.first == reader) return true;
    }
    return false;
}

std::string known_readers() {
    return joined(readers(), [](const auto& entry) { return entry.first; });
}

Image read_image(const std::vector<std::string>& paths, const std::string& reader, const ReadOptions& options) {
    const std::string first = paths.empty() ? "" : paths[0];
    return as_image_error("read", first, [&] { return find(reader)(paths, options, false); });
}

Image read_segmentation(const std::string& path, const std::string& reader, const ReadOptions& options) {
    return as_image_error("read", path, [&] { return find(reader)({path}, options, true); });
}

Affine affine_of(const Header& header) { return header.affine(); }

void write_labels(const std::string& path, const Labels& labels, const Header& header) {
    as_image_error("write", path, [&] { header.write(path, labels); });
}

}  // namespace fastnnunet::images
