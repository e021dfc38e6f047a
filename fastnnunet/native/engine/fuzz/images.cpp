// Image files: the last byte of the input says which format and reader, the rest is the file. What is read is written
// again, and must be read as it was written.
#include <cstddef>
#include <cstdint>
#include <string>

#include "fuzz/round_trip.hpp"
#include "fuzz/scratch.hpp"
#include "images/image.hpp"

namespace {

using namespace fastnnunet::images;

struct Way {
    const char *ending, *reader;
};
constexpr Way kWays[] = {
    {".nii", "SimpleITKIO"},    {".nii.gz", "SimpleITKIO"}, {".nii", "NibabelIOWithReorient"},
    {".nii.gz", "NibabelIO"},   {".nii", "SimpleITKIOWithReorient"}, {".mha", "SimpleITKIO"},
    {".nrrd", "SimpleITKIO"},   {".nrrd", "SimpleITKIOWithReorient"}, {".png", "NaturalImage2DIO"},
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::Scratch scratch;
    if (size == 0) return 0;
    const Way& way = kWays[data[size - 1] % (sizeof kWays / sizeof *kWays)];
    const std::string path = scratch.write(std::string("image") + way.ending, data, size - 1);
    try {
        const Image image = read_image({path}, way.reader);
        if (image.size() < 1 << 16) fuzz::check_round_trip(image, way.reader, scratch.folder() + "/labels" + way.ending);
    } catch (const ImageError&) {
    }
    return 0;
}
