#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <future>

#include "bundle/file.hpp"
#include "error.hpp"
#include "images/npz.hpp"
#include "predict/files.hpp"
#include "program/cases.hpp"
#include "program/commands.hpp"

namespace fastnnunet::engine {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

std::atomic<bool> interrupted{false};

struct Interrupted : std::runtime_error {
    Interrupted() : std::runtime_error("interrupted") {}
};

void on_interrupt(int signal) {
    if (interrupted.exchange(true)) std::_Exit(128 + signal);  // twice: at once
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Writes a text to a sibling first, so that the file is whole or as it was.
void write_text(const std::string& path, const std::string& text) {
    const std::string partial = path + ".partial-" + std::to_string(getpid());
    std::ofstream file(partial, std::ios::binary);
    file << text;
    file.close();
    std::error_code error, ignored;
    if (file) fs::rename(partial, path, error);
    if (file && !error) return;
    fs::remove(partial, ignored);
    throw NoRoomError("cannot write " + path + ": " + (error ? error.message() : "no room, or no permission") +
                      "\nmake room, or give another -o");
}

void make_folder(const fs::path& folder) {
    std::error_code error;
    if (!folder.empty()) fs::create_directories(folder, error);
    if (error)
        throw NoRoomError("cannot make the folder " + folder.string() + ": " + error.message() + "\ngive another -o");
}

Json text_value(const std::string& text) { return Json(Json::Kind::text, text); }
Json truth(bool value) { return Json(Json::Kind::boolean, value ? "true" : "false"); }
Json whole(std::int64_t value) { return Json(Json::Kind::integer, std::to_string(value)); }

// What nnU-Net's later steps look for
void write_run_files(const Model& model, const Arguments& arguments) {
    Json described = parse_json(model.describe(), "the description");
    described.members().insert(described.members().begin(), {"version", text_value(FASTNNUNET_VERSION)});
    Json run(Json::Kind::object, "");
    run.members() = {
        {"list_of_lists_or_source_folder", text_value(arguments.input)},
        {"output_folder_or_list_of_truncated_output_files", text_value(arguments.output)},
        {"save_probabilities", truth(arguments.probabilities)},
        {"overwrite", truth(arguments.overwrite)},
        {"num_processes_preprocessing", whole(arguments.readers)},
        {"num_processes_segmentation_export", whole(arguments.writers)},
        {"num_parts", whole(arguments.parts)},
        {"part_id", whole(arguments.part)},
        {"folder_with_segs_from_prev_stage", arguments.previous.empty() ? Json() : text_value(arguments.previous)},
        {"fastnnunet", described},
    };
    make_folder(arguments.output);
    write_text(joined(arguments.output, kRunFiles[0]), run.indented(true));
    write_text(joined(arguments.output, kRunFiles[1]), model.bundle().dataset_json.indented(false));
    write_text(joined(arguments.output, kRunFiles[2]), model.bundle().plans.indented(false));
}

// A case on its way.
struct Work {
    NamedCase named;
    LoadedCase loaded;
    Inferred inferred;
    std::string error;
    fastnnunet_status status = FASTNNUNET_OK;
};

template <class Body>
void attempt(Work& work, const Body& body) {
    if (!work.error.empty()) return;
    try {
        if (interrupted) throw Interrupted();
        body();
    } catch (const Interrupted&) {
        throw;
    } catch (const Error& e) {
        work.error = e.what();
        work.status = e.status;
    } catch (const std::bad_alloc&) {
        work.error = "not enough memory\nclose other programs, or crop the image";
        work.status = FASTNNUNET_NO_MEMORY;
    } catch (const std::exception& e) {
        work.error =
            std::string("unexpected: ") + e.what() + "\nplease report it, with the shape and the header of the image";
        work.status = FASTNNUNET_INTERNAL;
    }
}

// A line that is written over on a terminal.
class Bar {
public:
    explicit Bar(bool wanted) : is_shown_(wanted && isatty(STDERR_FILENO) != 0) {}
    ~Bar() { clear(); }

    void show(const std::string& text) {
        if (!is_shown_) return;
        std::fprintf(stderr, "\r\x1b[K%s", text.c_str());
        is_dirty_ = true;
    }

    void clear() {
        if (is_dirty_) std::fputs("\r\x1b[K", stderr);
        is_dirty_ = false;
    }

private:
    bool is_shown_, is_dirty_ = false;
};

class Predicting {
public:
    Predicting(const Model& model, const Arguments& arguments, const Outputs& outputs, const Cleanup& cleanup,
               bool writes_run_files)
        : model_(model), arguments_(arguments), outputs_(outputs), cleanup_(cleanup), writes_run_files_(writes_run_files),
          bar_(arguments.bars) {}

    // Cases in order; the next is read and the last written meanwhile. Throws where there is no room.
    void run(std::vector<NamedCase> cases, bool is_folder) {
        const auto launch = arguments_.threaded() ? std::launch::async : std::launch::deferred;
        const auto load_next = [&](std::size_t number) {
            return std::async(launch, [this, one = cases[number]] { return load(one); });
        };
        std::future<Work> ahead, behind;
        if (!cases.empty()) ahead = load_next(0);
        const std::string& stays = model_.stays_on_cpu();  // what loading threw ends the run
        if (!stays.empty()) std::fprintf(stderr, "%s\n", printable(stays).c_str());
        for (std::size_t number = 0; number < cases.size(); ++number) {
            Work work = ahead.get();
            if (number + 1 < cases.size()) ahead = load_next(number + 1);
            attempt(work, [&] {
                const auto progress = [&](std::int64_t tile, std::int64_t tiles) {
                    if (interrupted) throw Interrupted();
                    bar_.show(printable(work.named.name) + "  tile " + std::to_string(tile) + "/" +
                              std::to_string(tiles) + "  case " + std::to_string(number + 1) + "/" +
                              std::to_string(cases.size()));
                };
                work.inferred = infer_case(model_, work.loaded, progress, arguments_.probabilities);
            });
            if (behind.valid()) report(behind.get(), is_folder);
            behind =
                std::async(launch, [this, work = std::make_shared<Work>(std::move(work))] { return finish(*work); });
        }
        if (behind.valid()) report(behind.get(), is_folder);
    }

    std::vector<Work> done;
    std::size_t failed = 0;

private:
    Work load(const NamedCase& one) const {
        Work work;
        work.named = one;
        attempt(work, [&] {
            if (!one.problem.empty()) throw BadImage(one.problem);
            FileCase files{one.name, one.channels, one.output, "", arguments_.series};
            if (!arguments_.previous.empty()) {
                files.previous = joined(arguments_.previous, one.name + model_.bundle().file_ending);
            }
            work.loaded = load_case(model_, files, outputs_);
        });
        return work;
    }

    Work finish(Work& work) {
        attempt(work, [&] {
            make_folder(fs::path(work.named.output).parent_path());
            if (writes_run_files_ && !has_run_files_) {  // with the first segmentation
                write_run_files(model_, arguments_);
                has_run_files_ = true;
            }
            finish_case(model_, work.loaded, std::move(work.inferred), work.named.output, outputs_, cleanup_);
        });
        work.inferred = {};
        return std::move(work);
    }

    void report(Work work, bool is_folder) {
        bar_.clear();
        for (const std::string& warning : work.loaded.warnings) {
            std::fprintf(stderr, "%s: %s\n", printable(work.named.name).c_str(), printable(warning).c_str());
        }
        if (!work.error.empty()) {
            if (!is_folder || work.status == FASTNNUNET_NO_ROOM) throw Error(work.status, work.error);
            std::fprintf(stderr, "failed: %s: %s\n", printable(work.named.name).c_str(), printable(work.error).c_str());
            ++failed;
            return;
        }
        if (arguments_.verbose) describe(work);
        work.loaded.preprocessed.data = {};
        done.push_back(std::move(work));
    }

    static void describe(const Work& work) {
        const Case& from = work.loaded.preprocessed;
        const StageTimes& times = work.loaded.times;
        std::fprintf(stderr,
                     "%s: image %s, network sees (%lld, %s; ms: read %.1f, preprocess %.1f, infer %.1f, "
                     "postprocess %.1f, write %.1f\n",
                     printable(work.named.name).c_str(), tuple_text(from.image_shape).c_str(),
                     static_cast<long long>(from.data.count), tuple_text(from.data.shape).substr(1).c_str(),
                     1e3 * times.read_s, 1e3 * times.preprocess_s, 1e3 * times.infer_s, 1e3 * times.postprocess_s,
                     1e3 * times.write_s);
    }

    const Model& model_;
    const Arguments& arguments_;
    const Outputs& outputs_;
    const Cleanup& cleanup_;
    bool writes_run_files_, has_run_files_ = false;
    Bar bar_;
};

// Whether a case was predicted: other programs, and computers that crash, leave empty files and beginnings of files.
bool is_done(const std::string& path, const Bundle& bundle, const Outputs& outputs, bool with_probabilities) {
    const std::string probabilities = outputs.probabilities(path);
    for (std::size_t format = 0; format < outputs.formats().size(); ++format) {
        if (!is_regular_file(outputs.file(path, format))) return false;
    }
    if (with_probabilities && !is_regular_file(probabilities)) return false;
    const auto again = [](const std::string& file) {
        std::fprintf(stderr, "%s is damaged or not complete: its case is predicted again\n", printable(file).c_str());
        return false;
    };
    if (outputs.formats().front() == "dicom-seg") {
        if (!outputs.segmentation()->is_whole(path)) return again(path);
    } else {
        try {
            images::read_segmentation(path, bundle.reader_writer);
        } catch (const images::ImageError&) {
            return again(path);
        }
    }
    return !with_probabilities || images::is_probabilities(probabilities) || again(probabilities);
}

void check_previous(const Arguments& arguments, const Bundle& bundle) {
    const bool is_stage = !bundle.previous_labels.empty();
    if (arguments.previous.empty() == is_stage) {
        throw SpecError(is_stage ? "this bundle is a cascade stage, it needs the segmentations of the previous stage\n"
                                   "predict them first and give their folder with -prev_stage_predictions"
                                 : "-prev_stage_predictions: this bundle is no cascade stage; leave it out");
    }
    if (is_stage && !is_folder(arguments.previous)) {
        throw NotFoundError("-prev_stage_predictions: " + arguments.previous +
                            " is no folder; give the previous stage's output");
    }
}

struct Stage {
    const char* name;
    double StageTimes::*seconds;
};
constexpr Stage kStages[] = {{"read", &StageTimes::read_s},
                             {"preprocess", &StageTimes::preprocess_s},
                             {"infer", &StageTimes::infer_s},
                             {"postprocess", &StageTimes::postprocess_s},
                             {"write", &StageTimes::write_s}};

void print_profile(const std::vector<Work>& done) {
    std::printf("milliseconds (cases overlap: the time on the clock is shorter than the sum)\n");
    for (const Work& work : done) {
        std::printf("%s:", printable(work.named.name).c_str());
        for (const Stage& stage : kStages)
            std::printf(" %s %.1f", stage.name, 1e3 * (work.loaded.times.*stage.seconds));
        std::printf("\n");
    }
}

std::string profile_json(const Model& model, const Predicting& run, double wall_s) {
    Json record = parse_json(model.describe(), "the description");
    Json cases(Json::Kind::list, "");
    for (const Work& work : run.done) {
        Json one(Json::Kind::object, "");
        one.members().emplace_back("case", text_value(work.named.name));
        for (const Stage& stage : kStages) {
            one.members().emplace_back(std::string(stage.name) + "_s",
                                       Json(Json::Kind::real, python_real(work.loaded.times.*stage.seconds)));
        }
        cases.items().push_back(one);
    }
    record.members().emplace_back("load_s", Json(Json::Kind::real, python_real(model.load_s())));
    record.members().emplace_back("wall_s", Json(Json::Kind::real, python_real(wall_s)));
    record.members().emplace_back("cases", cases);
    return record.indented(false);
}

}  // namespace

int predict(const Arguments& arguments) {
    std::signal(SIGINT, on_interrupt);
    static const Model model(arguments.model, arguments.settings, false);  // which is not taken down: the process ends
    const Bundle& bundle = model.bundle();
    check_previous(arguments, bundle);
    check_reader(bundle);
    const Cleanup cleanup = parse_cleanup(bundle.labels, arguments.keep_largest, arguments.min_size,
                                          arguments.fill_holes, arguments.postprocessing);
    const Outputs outputs(bundle, arguments.formats.empty() ? std::vector<std::string>{"image"} : arguments.formats,
                          arguments.segmentation_type, arguments.settings.backend.plugins);
    const FoundCases found = find_cases(arguments.input, arguments.output, bundle, outputs.ending());
    const auto is_series = [](const NamedCase& one) { return is_folder(one.channels.front()); };
    if (outputs.segmentation() != nullptr && std::none_of(found.cases.begin(), found.cases.end(), is_series)) {
        SegmentationWriter::refuse_other_than_series(printable(arguments.input));
    }
    for (const std::string& warning : found.warnings) {
        std::fprintf(stderr, "%s: not predicted: %s\n", printable(arguments.input).c_str(), printable(warning).c_str());
    }
    const bool is_file = !found.is_folder && found.cases.front().output == arguments.output;
    const auto beside = [&](const std::string& output) {
        std::vector<std::string> files;
        for (std::size_t format = 1; format < outputs.formats().size(); ++format) files.push_back(outputs.file(output, format));
        if (arguments.probabilities) files.push_back(outputs.probabilities(output));
        return files;
    };
    refuse_overlap(found.cases, is_file ? "" : arguments.output, beside, arguments.previous, bundle.file_ending);
    std::vector<NamedCase> planned;
    for (std::size_t i = static_cast<std::size_t>(arguments.part); i < found.cases.size();
         i += static_cast<std::size_t>(arguments.parts)) {
        const NamedCase& one = found.cases[i];
        if (arguments.overwrite || !is_done(one.output, bundle, outputs, arguments.probabilities)) planned.push_back(one);
    }
    Predicting run(model, arguments, outputs, cleanup, !is_file);
    const auto start = Clock::now();
    try {
        run.run(planned, found.is_folder);
    } catch (const Interrupted&) {
        std::fputs("interrupted; finished cases are kept, --continue_prediction goes on after them\n", stderr);
        std::fflush(nullptr);
        std::_Exit(130);
    }
    const double wall_s = seconds_since(start);
    const std::string description = model.describe();
    const Json described = parse_json(description, "the description");
    std::string way = described.find("way")->text();
    way = way == "window" ? "" : " in " + way;
    if (const Json* locate = described.find("locate"); locate != nullptr && locate->truth()) {
        way += " in the locator's box";
    }
    std::printf("%zu case(s) predicted with %s%s into %s (model loaded in %.2f s)\n", run.done.size(),
                model.network().name().c_str(), way.c_str(),
                printable(arguments.output).c_str(), model.load_s());
    if (!run.done.empty()) {
        std::printf("%.1f ms per case; mean of its stages:", 1e3 * wall_s / static_cast<double>(planned.size()));
        for (const Stage& stage : kStages) {
            double sum = 0;
            for (const Work& work : run.done) sum += work.loaded.times.*stage.seconds;
            std::printf("%s %s %.1f", stage.name == kStages[0].name ? "" : ",", stage.name,
                        1e3 * sum / static_cast<double>(run.done.size()));
        }
        std::printf("\n");
    }
    if (arguments.profile) print_profile(run.done);
    if (arguments.profile_json) {
        const std::string folder = is_file ? fs::path(arguments.output).parent_path().string() : arguments.output;
        make_folder(folder);
        write_text(joined(folder, "fastnnunet_profile.json"), profile_json(model, run, wall_s));
    }
    if (run.failed == 0) return 0;
    std::fprintf(stderr, "%zu case(s) failed, see above\n", run.failed);
    return 1;
}

}  // namespace fastnnunet::engine
