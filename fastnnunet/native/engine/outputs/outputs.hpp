// What is written of a prediction: formats, and the files of a case. As fastnnunet/outputs/write.py.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "outputs/segmentation.hpp"

namespace fastnnunet::engine {

class Outputs {
public:
    // `formats`: image, dicom-seg, each once; the first one says whether a case is done. `segmentation_type`: binary or
    // labelmap. Throws SpecError.
    Outputs(const Bundle& bundle, const std::vector<std::string>& formats, const std::string& segmentation_type,
            const std::string& plugins);

    const std::vector<std::string>& formats() const { return formats_; }
    // Of the first format
    const std::string& ending() const { return endings_.front(); }
    // Where a format is written of a case whose first format is the file `output`
    std::string file(const std::string& output, std::size_t format) const;
    std::string probabilities(const std::string& output) const;
    // None where no format is dicom-seg
    const SegmentationWriter* segmentation() const { return segmentation_.get(); }

private:
    std::vector<std::string> formats_, endings_;
    std::shared_ptr<const SegmentationWriter> segmentation_;
};

}  // namespace fastnnunet::engine
