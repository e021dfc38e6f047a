// DICOM Segmentations of predicted series: what fastnnunet/outputs/dicom/seg.py and slices.py do, by a plugin.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bundle/bundle.hpp"
#include "images/dicom/series.hpp"
#include "images/image.hpp"
#include "outputs/dicom_seg/plugin.h"
#include "predict/preprocess.hpp"
#include "predict/tidy.hpp"

namespace fastnnunet::engine {

// A series that a segmentation refers to
struct SegmentedSeries {
    std::string folder;
    images::DicomSlices found;
};

class SegmentationWriter {
public:
    // Opens the plugin. Throws SpecError where there is none, where the bundle has codes of its own, which this engine
    // does not read, and for a label map of regions that overlap.
    SegmentationWriter(const Bundle& bundle, bool is_label_map, const std::string& plugins);

    // Throws BadImage: a case, or what was given as the image, is no DICOM series.
    [[noreturn]] static void refuse_other_than_series(const std::string& name);

    // Finds out before any work whether a segmentation can refer to the images of a case; adds to `warnings` what of
    // the headers is mended. Throws BadImage.
    SegmentedSeries check(const std::string& name, const std::vector<std::string>& channels,
                          const std::string& series_uid, std::vector<std::string>& warnings) const;

    // A segment for each structure, in their order; `header`: of the image that `labels` have the axes of. The file is
    // whole or as it was. Throws BadImage.
    void write(const std::string& name, const LabelMap& labels, const images::Header& header,
               const SegmentedSeries& series, const std::string& file) const;

    bool is_whole(const std::string& file) const;

private:
    fastnnunet_seg_said run(const std::string& name, const SegmentedSeries& series, const LabelMap* labels,
                            const std::string& file) const;

    const fastnnunet_seg_writer* plugin_;
    std::string model_;
    bool is_label_map_;
    std::vector<NamedLabels> structures_;
};

}  // namespace fastnnunet::engine
