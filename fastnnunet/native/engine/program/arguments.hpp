// The command line: the flags of `fastnnunet predict` as far as they apply.
#pragma once

#include <string>
#include <vector>

#include "predict/model.hpp"

namespace fastnnunet::engine {

struct Arguments {
    std::string input, output, model;
    Settings settings;
    std::string previous;
    std::string series;
    std::vector<std::string> keep_largest, fill_holes;
    std::string min_size, postprocessing;
    std::vector<std::string> formats;  // none: image
    std::string segmentation_type = "binary";
    bool probabilities = false;  // beside the labels
    bool verbose = false, overwrite = true, bars = true, profile = false, profile_json = false;
    int readers = 3, writers = 3;  // -npp and -nps; none of both: everything in one thread
    int parts = 1, part = 0;
    int runs = 10;                    // of bench
    std::vector<std::int64_t> shape;  // of bench, z y x

    bool threaded() const { return readers > 0 || writers > 0; }
};

enum class Command { predict, info, bench };

// Throws SpecError for words that are none of the command's.
Arguments parse(Command command, const std::vector<std::string>& words);

std::string usage(Command command);
std::string usage();

}  // namespace fastnnunet::engine
