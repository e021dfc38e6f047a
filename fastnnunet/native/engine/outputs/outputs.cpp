#include "outputs/outputs.hpp"

#include <algorithm>

#include "error.hpp"

namespace fastnnunet::engine {
namespace {

// `case.nii.gz` -> `case.npz`
std::string sibling(const std::string& output, const std::string& ending, const std::string& other) {
    const bool has_ending =
        output.size() > ending.size() && output.compare(output.size() - ending.size(), ending.size(), ending) == 0;
    return (has_ending ? output.substr(0, output.size() - ending.size()) : output) + other;
}

}  // namespace

Outputs::Outputs(const Bundle& bundle, const std::vector<std::string>& formats, const std::string& segmentation_type,
                 const std::string& plugins)
    : formats_(formats) {
    for (const std::string& format : formats_) {
        if (std::count(formats_.begin(), formats_.end(), format) > 1) {
            throw SpecError("--output-format: got " + format + " twice, expected each once");
        }
        endings_.push_back(format == "image" ? bundle.file_ending : ".dcm");
    }
    if (segmentation_type != "binary" && segmentation_type != "labelmap") {
        throw SpecError("--segmentation-type: got " + python_text(segmentation_type) +
                        ", expected one of binary, labelmap");
    }
    const bool is_seg = std::find(formats_.begin(), formats_.end(), "dicom-seg") != formats_.end();
    if (!is_seg && segmentation_type != "binary") {
        throw SpecError("--segmentation-type is one of DICOM SEG; add --output-format dicom-seg");
    }
    if (is_seg) {
        segmentation_ = std::make_shared<SegmentationWriter>(bundle, segmentation_type == "labelmap", plugins);
    }
}

std::string Outputs::file(const std::string& output, std::size_t format) const {
    return format == 0 ? output : sibling(output, ending(), endings_[format]);
}

std::string Outputs::probabilities(const std::string& output) const { return sibling(output, ending(), ".npz"); }

}  // namespace fastnnunet::engine
