// nnU-Net's NaturalImage2DIO, of PNG pictures.

#include "../image.hpp"
#include "../text.hpp"
#include "png.hpp"

namespace fastnnunet::images {
namespace {

class PictureHeader final : public Header {
public:
    void write(const std::string& path, const Labels& labels) const override {
        if (labels.shape_ZYX[0] != 1) {
            throw ImageError("cannot write " + path + ": the label map has " + std::to_string(labels.shape_ZYX[0]) +
                             " slices, expected one");
        }
        if (!ends_with(lowered(path), ".png")) {
            throw ImageError("cannot write " + path +
                             ": this engine writes pictures as PNG alone; expected a name ending "
                             "in .png");
        }
        write_png(path, SmallestLabels(labels));
    }
};

Channel read_one(const std::string& path) {
    if (is_folder(path)) {
        throw ImageError(path + ": this model reads pictures (PNG, BMP, TIFF), not DICOM; convert it first");
    }
    File exists(path);  // says that it is missing before it says what it should be
    if (!ends_with(lowered(path), ".png")) {
        throw ImageError(path +
                         ": of pictures this engine reads PNG alone (.png); convert it first, or use `fastnnunet "
                         "predict`");
    }
    Channel channel;
    channel.volume = read_png(path);
    channel.has_channels = channel.volume.sizes_xyz.size() == 4;
    channel.spacing_ZYX = {999, 1, 1};
    channel.header = std::make_shared<PictureHeader>();
    return channel;
}

}  // namespace

Reader natural_reader() {
    return [](const std::vector<std::string>& paths, const ReadOptions& options, bool) {
        return read_channels(paths, options.threads, read_one);
    };
}

}  // namespace fastnnunet::images
