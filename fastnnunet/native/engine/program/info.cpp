#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>

#include "bundle/file.hpp"
#include "error.hpp"
#include "program/commands.hpp"

namespace fastnnunet::engine {
namespace {

std::string list_text(const Sizes& sizes) {
    std::string text;
    for (const std::int64_t size : sizes) text += (text.empty() ? "" : " x ") + std::to_string(size);
    return text;
}

void describe(const Bundle& bundle) {
    std::printf("%s (%s)\n", printable(bundle.name).c_str(), printable(bundle.configuration).c_str());
    std::string channels, folds;
    for (const std::string& name : bundle.channel_names) channels += (channels.empty() ? "" : ", ") + printable(name);
    for (const std::string& name : bundle.folds) folds += " " + printable(name);
    std::printf("  channels: %s\n  images: %s by %s\n", channels.c_str(), bundle.file_ending.c_str(),
                printable(bundle.reader_writer).c_str());
    std::printf("  patch: %s\n", list_text(bundle.patch_size).c_str());
    if (bundle.one_pass) std::printf("  one pass: halo %s\n", list_text(bundle.one_pass->halo).c_str());
    if (bundle.locator) std::printf("  locator: margin %g mm\n", bundle.locator->margin_mm);
    if (!folds.empty()) std::printf("  folds:%s\n", folds.c_str());
    for (const auto& [name, value] : bundle.labels.members()) {
        std::printf("  label %s: %s\n", printable(name).c_str(), value.python().c_str());
    }
}

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::string printable(const std::string& text) {
    std::string made;
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if ((byte < 0x20 && c != '\n') || byte == 0x7F) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\x%02x", byte);
            made += escaped;
        } else {
            made += c;
        }
    }
    return made;
}

int info(const Arguments& arguments) {
    if (!arguments.model.empty()) describe(load_bundle(arguments.model));
    std::printf("fastnnunet-engine %s, %d core(s)\n", FASTNNUNET_VERSION, available_cores());
    for (const auto& [name, reason] : list_backends("")) {
        std::string text = reason.empty() ? "can be used" : reason;
        for (std::size_t at = 0; (at = text.find('\n', at)) != std::string::npos; at += 5)
            text.replace(at, 1, "\n    ");
        std::printf("  %s: %s\n", name.c_str(), printable(text).c_str());
    }
    return 0;
}

int bench(const Arguments& arguments) {
    const auto start = std::chrono::steady_clock::now();
    const Model model(arguments.model, arguments.settings);
    const double load_s = seconds_since(start);
    const Bundle& bundle = model.bundle();
    Index shape{1, 1, 1};
    std::copy(bundle.patch_size.begin(), bundle.patch_size.end(),
              shape.end() - static_cast<long>(bundle.patch_size.size()));
    if (!arguments.shape.empty()) {
        if (arguments.shape.size() != 3)
            throw SpecError("--shape: got " + std::to_string(arguments.shape.size()) + " numbers, expected z y x");
        std::copy(arguments.shape.begin(), arguments.shape.end(), shape.begin());
    }
    Spacing spacing{1, 1, 1};
    std::copy(bundle.spacing_mm.begin(), bundle.spacing_mm.end(),
              spacing.end() - static_cast<long>(bundle.spacing_mm.size()));
    const auto transposed = [&](auto of) {
        decltype(of) made{};
        for (int axis = 0; axis < 3; ++axis) made[bundle.transpose_forward[axis]] = of[axis];
        return made;
    };
    shape = transposed(shape);
    spacing = transposed(spacing);
    std::vector<std::int32_t> previous(static_cast<std::size_t>(voxels_of(shape)), 1);
    std::string runs;
    for (int run = 0; run < arguments.runs; ++run) {
        ImageArray image;
        image.voxels = Array4<float>(static_cast<std::int64_t>(bundle.channel_names.size()), shape);
        image.spacing = spacing;
        std::mt19937 random(0);
        std::uniform_real_distribution<float> noise(1, 200);
        for (std::int64_t i = 0; i < image.voxels.size(); ++i) image.voxels.values[i] = std::floor(noise(random));
        if (!bundle.previous_labels.empty()) {
            image.previous = previous.data();
            image.previous_shape = shape;
        }
        const auto begin = std::chrono::steady_clock::now();
        const Prediction made = model.predict(std::move(image), {});
        char text[256];
        std::snprintf(text, sizeof text,
                      "%s\n  {\"preprocess_s\": %.6f, \"infer_s\": %.6f, \"postprocess_s\": %.6f, \"wall_s\": %.6f}",
                      run == 0 ? "" : ",", made.times.preprocess_s, made.times.infer_s, made.times.postprocess_s,
                      seconds_since(begin));
        runs += text;
    }
    std::printf("{\"engine\": %s,\n \"shape\": [%lld, %lld, %lld], \"load_s\": %.6f, \"runs\": [%s\n]}\n",
                model.describe().c_str(), static_cast<long long>(shape[0]), static_cast<long long>(shape[1]),
                static_cast<long long>(shape[2]), load_s, runs.c_str());
    return 0;
}

}  // namespace fastnnunet::engine
