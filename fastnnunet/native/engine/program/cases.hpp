// Which files belong to which case, and where its prediction goes: nnU-Net's naming. As fastnnunet/images/cases.py.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "bundle/bundle.hpp"

namespace fastnnunet::engine {

struct NamedCase {
    std::string name;
    std::vector<std::string> channels;  // files, or folders of DICOM slices
    std::string problem;                // why they cannot be one image
    std::string output;
};

struct FoundCases {
    std::vector<NamedCase> cases;
    bool is_folder = false;             // of images; else a single one
    std::vector<std::string> warnings;  // of what else lies there
};

// Cases of an image file or folder with their outputs. Throws NotFoundError, BadImage, SpecError.
// `ending`: of the outputs.
FoundCases find_cases(const std::string& input, const std::string& output, const Bundle& bundle,
                      const std::string& ending);

// Throws SpecError where an output would replace an input of the run, a file of a model, or another output.
// `beside`: the files that are written beside an output; `previous`: the folder of the previous stage, whose files end
// as those of the model do.
void refuse_overlap(const std::vector<NamedCase>& cases, const std::string& run_folder,
                    const std::function<std::vector<std::string>(const std::string& output)>& beside,
                    const std::string& previous, const std::string& file_ending);

extern const char* const kRunFiles[3];  // written beside the segmentations of a folder

}  // namespace fastnnunet::engine
