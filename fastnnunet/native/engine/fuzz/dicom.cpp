// Headers of DICOM files, and series of them: slices with "SLICE" between them are the files of one folder. Labels of what
// is read are written, and must be read as they were written.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "fuzz/round_trip.hpp"
#include "fuzz/scratch.hpp"
#include "images/dicom/head.hpp"
#include "images/image.hpp"

namespace {

using namespace fastnnunet::images;

constexpr std::string_view kBetween = "SLICE";
constexpr std::size_t kMostSlices = 8;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fuzz::Scratch scratch;
    const std::filesystem::path folder = scratch.folder() + "/series";
    std::filesystem::remove_all(folder);
    std::filesystem::create_directory(folder);
    const std::string_view all(reinterpret_cast<const char*>(data), size);
    std::size_t at = 0;
    for (std::size_t number = 0; number < kMostSlices && at <= all.size(); ++number) {
        const std::size_t end = std::min(all.find(kBetween, at), all.size());
        const std::string path = scratch.write("series/" + std::to_string(number), data + at, end - at);
        try {
            if (const auto head = read_dicom_head(path)) {
                decimals(head->slope);
                decimals(head->intercept);
            }
        } catch (const ImageError&) {
        }
        at = end + kBetween.size();
    }
    is_dicom_folder(folder);
    try {
        const Image image = read_image({folder}, "SimpleITKIO");
        if (image.size() < 1 << 16) fuzz::check_round_trip(image, "SimpleITKIO", scratch.folder() + "/labels.nii");
    } catch (const ImageError&) {
    }
    return 0;
}
