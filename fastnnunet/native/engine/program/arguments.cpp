#include "program/arguments.hpp"

#include <cstdlib>
#include <functional>
#include <map>

#include "error.hpp"

namespace fastnnunet::engine {
namespace {

struct Flag {
    std::vector<std::string> names;
    const char* value;  // what it takes; null: nothing, "...": one or more words
    const char* help;
    std::function<void(const std::string&)> set;
    bool is_required = false;
};

double real(const std::string& name, const std::string& text) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0') throw SpecError(name + ": got " + python_text(text) + ", expected a number");
    return value;
}

int whole(const std::string& name, const std::string& text, int least) {
    char* end = nullptr;
    const long value = std::strtol(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || value < least || value > 1000000000) {
        throw SpecError(name + ": got " + python_text(text) + ", expected a whole number from " +
                        std::to_string(least) + " on");
    }
    return static_cast<int>(value);
}

std::vector<Flag> flags(Command command, Arguments& to) {
    Settings& settings = to.settings;
    const auto text = [](std::string& target) { return [&target](const std::string& word) { target = word; }; };
    const auto nothing = [](const std::string&) {};
    const bool predicts = command == Command::predict, runs = command != Command::info;
    std::vector<Flag> all;
    const auto add = [&](bool applies, Flag flag) {
        if (applies) all.push_back(std::move(flag));
    };
    add(predicts, {{"-i", "--input"},
                   "PATH",
                   "an image, or a folder of NAME_0000.nii.gz, NAME_0001.nii.gz, ...",
                   text(to.input),
                   true});
    add(predicts, {{"-o", "--output"}, "PATH", "a folder, or the file of a single image", text(to.output), true});
    add(true, {{"-m", "--model"}, "BUNDLE", "the bundle, which `fastnnunet export` makes", text(to.model), runs});
    add(runs, {{"-f", "--fold"}, "...", "of an ensemble these folds; default: all", [&](const std::string& word) {
        settings.folds.push_back(word);
    }});
    add(runs, {{"-step_size", "--step_size"},
               "NUMBER",
               "step between tiles / patch, of nnU-Net's window",
               [&](const std::string& word) { settings.step_size = real("-step_size", word); }});
    add(runs, {{"--passes"},
               "COUNT",
               "instead of one pass: the mean of this many, shifted against the strides",
               [&](const std::string& word) { settings.passes = whole("--passes", word, 1); }});
    add(runs, {{"--memory-limit"},
               "SIZE",
               "of one pass: memory of the network for a tile, such as 4G",
               text(settings.memory_limit)});
    add(runs, {{"--disable_tta"}, nullptr, "no mirroring: faster, less accurate", [&](const std::string&) {
        settings.mirroring = false;
    }});
    add(runs, {{"--locate"}, nullptr, "the default: in the box that the bundle's locator finds, if it has one", nothing});
    add(runs, {{"--no-locate"}, nullptr, "everywhere, though the bundle has a locator", [&](const std::string&) {
        settings.locate = false;
    }});
    add(predicts, {{"--save_probabilities"},
                   nullptr,
                   "write them beside the labels, as .npz; nnUNetv2_ensemble needs those of `fastnnunet predict`",
                   [&](const std::string&) { to.probabilities = true; }});
    add(predicts, {{"-prev_stage_predictions", "--prev_stage_predictions"},
                   "FOLDER",
                   "cascades: segmentations of the previous stage",
                   text(to.previous)});
    add(predicts, {{"--continue_prediction", "--c"},
                   nullptr,
                   "leave out cases that are predicted already",
                   [&](const std::string&) { to.overwrite = false; }});
    add(predicts, {{"-num_parts"},
                   "COUNT",
                   "commands that share the folder, each with its -part_id",
                   [&](const std::string& word) { to.parts = whole("-num_parts", word, 1); }});
    add(predicts, {{"-part_id"}, "NUMBER", "which of them this is, from 0", [&](const std::string& word) {
        to.part = whole("-part_id", word, 0);
    }});
    add(runs, {{"--backend"},
               "NAME",
               "auto (the fastest installed), openvino, onnxruntime or tensorrt",
               text(settings.backend.name)});
    add(runs, {{"-device"}, "NAME", "cpu, cuda, cuda:1, ...", text(settings.backend.device)});
    add(runs, {{"--precision"}, "NAME", "fp32 (as nnU-Net), bf16, fp16 or int8", text(settings.backend.precision)});
    add(runs, {{"--threads"}, "COUNT", "default: all cores", [&](const std::string& word) {
        settings.backend.threads = whole("--threads", word, 1);
    }});
    add(predicts, {{"--series"}, "UID", "SeriesInstanceUID, where a DICOM folder holds several", text(to.series)});
    add(predicts, {{"--output-format"},
                   "...",
                   "image: the model's file ending; of DICOM input dicom-seg: CASE.dcm",
                   [&](const std::string& word) {
        if (word != "image" && word != "dicom-seg") {
            throw SpecError("--output-format: got " + python_text(word) +
                            ", this program writes image and dicom-seg; for others use `fastnnunet predict`");
        }
        to.formats.push_back(word);
    }});
    add(predicts, {{"--segmentation-type"},
                   "NAME",
                   "of dicom-seg: binary, or labelmap, a newer kind",
                   text(to.segmentation_type)});
    add(predicts, {{"--keep-largest"},
                   "...",
                   "only the largest component of: all, each, a label, or several joined with +",
                   [&](const std::string& word) { to.keep_largest.push_back(word); }});
    add(predicts, {{"--min-size"}, "SIZE", "no smaller components: 20 (voxels) or 50mm3", text(to.min_size)});
    add(predicts, {{"--fill-holes"}, "...", "of these labels, as for --keep-largest", [&](const std::string& word) {
        to.fill_holes.push_back(word);
    }});
    add(predicts,
        {{"-pp_pkl_file", "--pp_pkl_file"}, "FILE", "nnU-Net's postprocessing.json", text(to.postprocessing)});
    add(predicts, {{"-npp"}, "COUNT", "0 with -nps 0: everything in one thread", [&](const std::string& word) {
        to.readers = whole("-npp", word, 0);
    }});
    add(predicts, {{"-nps"}, "COUNT", "0 with -npp 0: everything in one thread", [&](const std::string& word) {
        to.writers = whole("-nps", word, 0);
    }});
    add(predicts, {{"--verbose"}, nullptr, "a line for each case: its shapes and times", [&](const std::string&) {
        to.verbose = true;
    }});
    add(predicts, {{"--disable_progress_bar"}, nullptr, "no progress", [&](const std::string&) { to.bars = false; }});
    add(predicts, {{"--not_on_device"}, nullptr, "changes nothing", nothing});
    add(predicts, {{"--profile"}, nullptr, "print the time of every stage of every case", [&](const std::string&) {
        to.profile = true;
    }});
    add(predicts, {{"--profile_json"}, nullptr, "write it beside the output", [&](const std::string&) {
        to.profile_json = true;
    }});
    add(!predicts && runs,
        {{"--runs"}, "COUNT", "default: 10", [&](const std::string& word) { to.runs = whole("--runs", word, 1); }});
    add(!predicts && runs, {{"--shape"}, "...", "z y x of the image; default: a patch", [&](const std::string& word) {
        to.shape.push_back(whole("--shape", word, 1));
    }});
    return all;
}

const char* name_of(Command command) {
    return command == Command::predict ? "predict" : command == Command::info ? "info" : "bench";
}

// A variable of the shell that is not set would be taken for a default.
void refuse_empty(Command command, const std::vector<std::string>& words) {
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        const bool is_empty = word.empty();
        if (!is_empty && (word.rfind("--", 0) != 0 || word.back() != '=')) continue;
        const std::string before = i == 0 ? name_of(command) : words[i - 1];
        throw SpecError("an empty value " + (is_empty ? "behind " + before : "in " + word) +
                        ", expected something (a variable of the shell that is not set?)\n"
                        "give a value, . for the current folder, or leave the option out");
    }
}

// Flags of `fastnnunet predict` that take what this program has not
const std::map<std::string, const char*>& of_python() {
    static const std::map<std::string, const char*> known{
        {"-d", "models in nnUNet_results"},  {"--dataset", "models in nnUNet_results"},
        {"-c", "models in nnUNet_results"},  {"-p", "models in nnUNet_results"},
        {"-tr", "models in nnUNet_results"}, {"-chk", "model folders"},
        {"--name", "names of runs"},         {"--allow-code", "model folders"},
        {"--label-codes", "codes of a file"}};
    return known;
}

}  // namespace

Arguments parse(Command command, const std::vector<std::string>& words) {
    refuse_empty(command, words);
    Arguments made;
    std::vector<Flag> known = flags(command, made);
    const std::string program = std::string("fastnnunet-engine ") + name_of(command);
    const auto find = [&](const std::string& word) -> Flag* {
        for (Flag& flag : known) {
            for (const std::string& name : flag.names) {
                if (name == word) return &flag;
            }
        }
        return nullptr;
    };
    for (std::size_t at = 0; at < words.size(); ++at) {
        std::string word = words[at];
        std::string value;
        const std::size_t equals = word.rfind("--", 0) == 0 ? word.find('=') : std::string::npos;
        const bool has_value = equals != std::string::npos;
        if (has_value) {
            value = word.substr(equals + 1);
            word = word.substr(0, equals);
        }
        Flag* flag = find(word);
        if (flag == nullptr) {
            const auto python = of_python().find(word);
            throw SpecError(program + ": " + word +
                            (python == of_python().end() ? " is none of its options; " + program + " --help lists them"
                                                         : std::string(": this program has no ") + python->second +
                                                               "; use `fastnnunet predict`"));
        }
        flag->is_required = false;
        if (flag->value == nullptr) {
            if (has_value) throw SpecError(program + ": " + word + " takes no value");
            flag->set("");
            continue;
        }
        const auto is_word = [&](std::size_t i) { return i < words.size() && find(words[i]) == nullptr; };
        if (!has_value) {
            if (!is_word(at + 1)) throw SpecError(program + ": " + word + " needs a value (" + flag->value + ")");
            value = words[++at];
        }
        flag->set(value);
        while (std::string(flag->value) == "..." && is_word(at + 1) && words[at + 1].rfind("-", 0) != 0)
            flag->set(words[++at]);
    }
    for (const Flag& flag : known) {
        if (flag.is_required) throw SpecError(program + ": " + flag.names.front() + " is missing (" + flag.help + ")");
    }
    if (made.part >= made.parts) {
        throw SpecError("-part_id " + std::to_string(made.part) + " of -num_parts " + std::to_string(made.parts) +
                        ": parts are counted from 0, expected -part_id from 0 to -num_parts minus 1");
    }
    return made;
}

std::string usage(Command command) {
    Arguments ignored;
    std::string text = std::string("usage: fastnnunet-engine ") + name_of(command) + " OPTIONS\n\n";
    for (const Flag& flag : flags(command, ignored)) {
        std::string line = "  ";
        for (const std::string& name : flag.names) line += (line.size() > 2 ? ", " : "") + name;
        if (flag.value != nullptr)
            line += std::string(" ") + (std::string(flag.value) == "..." ? "WORD ..." : flag.value);
        line += line.size() < 38 ? std::string(38 - line.size(), ' ') : "\n" + std::string(38, ' ');
        text += line + flag.help + (flag.is_required ? " (required)" : "") + "\n";
    }
    return text;
}

std::string usage() {
    return "usage: fastnnunet-engine predict|info|bench OPTIONS\n\n"
           "  predict   segment images with a bundle, as `fastnnunet predict` does\n"
           "  info      what can be used here, and with -m what a bundle is\n"
           "  bench     time predictions of an image of noise\n\n"
           "`fastnnunet-engine predict --help` lists the options of a command.\n";
}

}  // namespace fastnnunet::engine
