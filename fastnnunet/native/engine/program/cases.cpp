#include "program/cases.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "bundle/file.hpp"
#include "error.hpp"
#include "images/image.hpp"

namespace fastnnunet::engine {

const char* const kRunFiles[3] = {"predict_from_raw_data_args.json", "dataset.json", "plans.json"};

namespace {

namespace fs = std::filesystem;

constexpr const char* kImageEndings[] = {".nii.gz", ".nii", ".nrrd", ".mha",  ".mhd", ".gipl",
                                         ".png",    ".bmp", ".tif",  ".tiff", ".dcm"};

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
    return text;
}

std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    std::error_code error;
    for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
        names.push_back(entry->path().filename().string());
    }
    if (error) throw NotFoundError("cannot read " + folder + ": " + error.message());
    std::sort(names.begin(), names.end());
    return names;
}

// `case_0001` -> `case` and 1. False where there is no channel number.
bool split(const std::string& stem, std::string& name, int& channel) {
    if (stem.size() < 6 || stem[stem.size() - 5] != '_') return false;
    const std::string digits = stem.substr(stem.size() - 4);
    if (digits.find_first_not_of("0123456789") != std::string::npos) return false;
    name = stem.substr(0, stem.size() - 5);
    channel = std::stoi(digits);
    return true;
}

std::string numbered(int channel) {
    const std::string digits = std::to_string(channel);
    return "_" + std::string(4 - digits.size(), '0') + digits;
}

std::vector<NamedCase> by_case(const std::string& folder, const std::vector<std::string>& names,
                               const std::string& ending, bool is_numbered) {
    std::map<std::string, std::map<int, std::string>> channels;
    std::vector<NamedCase> cases;
    for (const std::string& file : names) {
        const std::string stem = file.substr(0, file.size() - ending.size()), path = joined(folder, file);
        std::string name;
        int channel = 0;
        if (split(stem, name, channel)) {
            channels[name][channel] = path;
        } else if (is_numbered) {
            cases.push_back({stem,
                             {path},
                             path + " has no channel number; expected a name such as " + stem + "_0000" + ending,
                             ""});
        } else {
            cases.push_back({stem, {path}, "", ""});
        }
    }
    for (const auto& [name, files] : channels) {
        NamedCase made{name, {}, "", ""};
        int expected = 0;
        for (const auto& [channel, path] : files) {
            if (channel != expected && made.problem.empty()) {
                made.problem =
                    name + " has no " + name + numbered(expected) + ending + " in " + folder + " but later channels";
            }
            ++expected;
            made.channels.push_back(path);
        }
        cases.push_back(made);
    }
    std::sort(cases.begin(), cases.end(), [](const NamedCase& a, const NamedCase& b) { return a.name < b.name; });
    return cases;
}

NamedCase single_case(const std::string& path, const Bundle& bundle) {
    const fs::path image(path);
    const std::string file = image.filename().string(), low = lower(file);
    std::string ending;
    if (!is_folder(path)) {
        ending = image.extension().string();
        std::vector<std::string> known{lower(bundle.file_ending)};
        known.insert(known.end(), std::begin(kImageEndings), std::end(kImageEndings));
        for (const std::string& one : known) {
            if (!ends_with(low, one)) continue;
            ending = file.substr(file.size() - one.size());
            break;
        }
    }
    const std::string stem = file.substr(0, file.size() - ending.size());
    NamedCase made{stem, {path}, "", ""};
    std::string name;
    int channel = 0;
    if (!split(stem, name, channel)) return made;
    if (channel != 0 && bundle.channel_names.size() > 1) {
        throw BadImage(path + " is channel " + std::to_string(channel) + " of an image; give the one ending in _0000" +
                       ending);
    }
    made.name = name;
    for (std::size_t i = 1; i < bundle.channel_names.size(); ++i) {
        const std::string sibling = (image.parent_path() / (name + numbered(static_cast<int>(i)) + ending)).string();
        if (fs::exists(sibling)) made.channels.push_back(sibling);
    }
    return made;
}

std::vector<std::string> passed_over(const std::vector<std::string>& all, const std::set<std::string>& taken) {
    std::vector<std::string> others;
    for (const std::string& name : all) {
        const bool is_side = std::find(std::begin(kRunFiles), std::end(kRunFiles), name) != std::end(kRunFiles);
        if (name[0] != '.' && taken.count(name) == 0 && !is_side && name != "DICOMDIR") others.push_back(name);
    }
    if (others.empty()) return {};
    std::string text = std::to_string(others.size()) + " other file(s) or folder(s): ";
    for (std::size_t i = 0; i < std::min<std::size_t>(3, others.size()); ++i) text += (i ? ", " : "") + others[i];
    return {text + (others.size() > 3 ? ", ..." : "")};
}

std::string output_of(const std::string& output, const NamedCase& one, const std::string& ending, bool is_folder_of_images,
                      const std::string& input) {
    const std::string name = lower(fs::path(output).filename().string());
    const bool names_file = std::any_of(std::begin(kImageEndings), std::end(kImageEndings),
                                        [&](const char* known) { return ends_with(name, known); });
    if (is_folder(output) || !names_file) return joined(output, one.name + ending);
    if (is_folder_of_images) {
        throw SpecError("output " + output + " is a file name but the input " + input +
                        " is a folder; give a folder with -o");
    }
    if (!ends_with(output, ending)) {
        throw SpecError("output " + output + ": this run writes " + ending +
                        " files; name it so, or give a folder");
    }
    return output;
}

using Identity = std::pair<dev_t, ino_t>;

bool identify(const std::string& path, Identity& to) {
    struct stat status {};
    if (stat(path.c_str(), &status) != 0) return false;
    to = {status.st_dev, status.st_ino};
    return true;
}

}  // namespace

FoundCases find_cases(const std::string& input, const std::string& output, const Bundle& bundle,
                      const std::string& ending) {
    FoundCases found;
    if (is_regular_file(input)) {
        found.cases = {single_case(input, bundle)};
    } else if (!is_folder(input)) {
        throw NotFoundError(fs::exists(input)
                                ? "input is no file but a pipe, socket or device: " + input +
                                      "\nexpected an image file or a folder of images"
                                : "input not found: " + input + "\nexpected an image file or a folder of images");
    } else {
        const std::vector<std::string> all = names_in(input);
        std::vector<std::string> files, folders;
        for (const std::string& name : all) {
            if (name[0] == '.') continue;
            const std::string path = joined(input, name);
            if (ends_with(name, bundle.file_ending) && is_regular_file(path)) files.push_back(name);
            if (is_folder(path) && images::is_dicom_folder(path)) folders.push_back(name);
        }
        if (files.empty() && images::is_dicom_folder(input)) {
            found.cases = {single_case(fs::canonical(input).string(), bundle)};
        } else {
            found.is_folder = true;
            const std::vector<std::string>& taken = files.empty() ? folders : files;
            found.cases = files.empty() ? by_case(input, folders, "", bundle.channel_names.size() > 1)
                                        : by_case(input, files, bundle.file_ending, true);
            found.warnings = passed_over(all, {taken.begin(), taken.end()});
            if (found.cases.empty()) {
                throw NotFoundError("no image in " + input + ": expected files named NAME_0000" + bundle.file_ending +
                                    " or folders of DICOM files, found " +
                                    (found.warnings.empty() ? "nothing" : found.warnings.front()));
            }
        }
    }
    for (NamedCase& one : found.cases) {
        one.output = output_of(output, one, ending, found.is_folder, input);
        if (one.problem.empty() && is_folder(one.output)) {
            one.problem = "its output " + one.output + " is a folder; give another -o, or rename it";
        }
    }
    return found;
}

void refuse_overlap(const std::vector<NamedCase>& cases, const std::string& run_folder,
                    const std::function<std::vector<std::string>(const std::string& output)>& beside,
                    const std::string& previous, const std::string& file_ending) {
    std::vector<std::string> outputs;
    for (const NamedCase& one : cases) {
        outputs.push_back(one.output);
        for (const std::string& file : beside(one.output)) outputs.push_back(file);
    }
    if (!run_folder.empty()) {
        if (is_regular_file(joined(run_folder, "bundle.json"))) {
            throw SpecError(run_folder +
                            " is the folder of a model, whose plans.json and dataset.json would be replaced; give "
                            "another -o");
        }
        for (const char* name : kRunFiles) outputs.push_back(joined(run_folder, name));
    }
    std::map<Identity, std::string> there;
    std::set<std::string> names;
    for (const std::string& output : outputs) {
        if (!names.insert(output).second) {
            throw SpecError("two outputs of this run are one file: " + output + " and " + output +
                            "\nrename one of the images, or predict them into folders of their own");
        }
        if (Identity identity; identify(output, identity)) there[identity] = output;
    }
    std::vector<std::string> inputs;
    for (const NamedCase& one : cases) {
        inputs.insert(inputs.end(), one.channels.begin(), one.channels.end());
        if (!previous.empty()) inputs.push_back(joined(previous, one.name + file_ending));
    }
    for (const std::string& input : inputs) {
        Identity identity;
        if (!identify(input, identity) || there.count(identity) == 0) continue;
        const std::string& output = there[identity];
        throw SpecError(
            input + (output == input ? "" : ", which is " + output + ",") +
            " is an input of this run and would be replaced by its segmentation or by a file beside it; give "
            "another -o");
    }
}

}  // namespace fastnnunet::engine
