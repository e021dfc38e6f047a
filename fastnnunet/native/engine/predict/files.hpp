// Predicting image files: what runtime/predict.py does with one case.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "images/image.hpp"
#include "outputs/outputs.hpp"
#include "predict/model.hpp"
#include "predict/tidy.hpp"

namespace fastnnunet::engine {

// The files of one image and what to do with them.
struct FileCase {
    std::string name;
    std::vector<std::string> channels;
    std::string output;
    std::string previous;    // of a cascade stage: the previous stage's segmentation
    std::string series_uid;  // which series of a DICOM folder
};

// A case that has been read and preprocessed.
struct LoadedCase {
    Case preprocessed;
    std::shared_ptr<const images::Header> header;
    Spacing spacing;  // of the file
    std::string name;
    std::optional<SegmentedSeries> series;  // where a DICOM SEG is to refer to it
    std::vector<std::string> warnings;
    StageTimes times;
};

// What `outputs` cannot be written of is refused first. Throws BadImage.
LoadedCase load_case(const Model& model, const FileCase& files, const Outputs& outputs);
Inferred infer_case(const Model& model, LoadedCase& from, const Progress& progress, bool probabilities = false);
// Tidies and writes labels into `output` and, before it, into the files of other formats and the probabilities, as they
// are, into a .npz beside it: where `output` is, all is. Throws BadImage, NoRoomError.
void finish_case(const Model& model, LoadedCase& from, Inferred inferred, const std::string& output,
                 const Outputs& outputs, const Cleanup& cleanup);

// Throws SpecError for a bundle whose reader this engine does not have.
void check_reader(const Bundle& bundle);

}  // namespace fastnnunet::engine
