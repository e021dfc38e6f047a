// Predicting image files: what runtime/predict.py does with one case.
#pragma once

#include <string>
#include <vector>

#include "images/image.hpp"
#include "predict/model.hpp"
#include "predict/tidy.hpp"

namespace fastnnunet::engine {

// The files of one image and what to do with them.
struct FileCase {
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
    std::vector<std::string> warnings;
    StageTimes times;
};

// Throws BadImage.
LoadedCase load_case(const Model& model, const FileCase& files);
Inferred infer_case(const Model& model, LoadedCase& from, const Progress& progress, bool probabilities = false);
// Tidies and writes labels, and before them the probabilities, as they are, into a .npz beside them: where labels are,
// their probabilities are. Throws BadImage, NoRoomError.
void finish_case(const Model& model, LoadedCase& from, Inferred inferred, const std::string& output,
                 const Cleanup& cleanup);

// `case.nii.gz` -> `case.npz`
std::string probabilities_of(const std::string& output, const std::string& file_ending);

// Throws SpecError for a bundle whose reader this engine does not have.
void check_reader(const Bundle& bundle);

}  // namespace fastnnunet::engine
