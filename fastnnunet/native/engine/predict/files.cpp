#include "predict/files.hpp"

#include <chrono>

#include "bundle/file.hpp"
#include "error.hpp"
#include "images/npz.hpp"

namespace fastnnunet::engine {
namespace {

template <class Body>
auto timed(double& seconds, const Body& body) {
    const auto start = std::chrono::steady_clock::now();
    struct Adds {
        double& to;
        std::chrono::steady_clock::time_point start;
        ~Adds() { to += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }
    } const adds{seconds, start};
    return body();
}

template <class Body>
auto as_ours(const Body& body) {
    try {
        return body();
    } catch (const images::WriteError& e) {
        throw NoRoomError(e.what());
    } catch (const images::ImageError& e) {
        throw BadImage(e.what());
    }
}

ImageArray array_of(images::Image image) {
    ImageArray made;
    const auto& shape = image.shape_CZYX;
    made.voxels.count = shape[0];
    made.voxels.shape = {shape[1], shape[2], shape[3]};
    made.voxels.values = std::move(image.voxels_CZYX);
    made.spacing = image.spacing_ZYX;
    return made;
}

}  // namespace

void check_reader(const Bundle& bundle) {
    if (images::has_reader(bundle.reader_writer)) return;
    throw SpecError("the model's image reader is " + python_text(bundle.reader_writer) +
                    ", which this engine does not have; "
                    "known: " +
                    images::known_readers() + "\nread the images yourself and predict arrays, or use " +
                    "`fastnnunet predict`");
}

LoadedCase load_case(const Model& model, const FileCase& files, const Outputs& outputs) {
    LoadedCase made;
    made.name = files.name;
    if (const SegmentationWriter* writer = outputs.segmentation(); writer != nullptr) {
        made.series = writer->check(files.name, files.channels, files.series_uid, made.warnings);
    }
    const Bundle& bundle = model.bundle();
    images::ReadOptions options;
    options.series_uid = files.series_uid;
    options.threads = model.threads();
    ImageArray image;
    std::vector<std::int32_t> previous;
    timed(made.times.read_s, [&] {
        images::Image read = as_ours([&] { return images::read_image(files.channels, bundle.reader_writer, options); });
        made.header = read.header;
        made.spacing = read.spacing_ZYX;
        made.warnings.insert(made.warnings.end(), read.warnings.begin(), read.warnings.end());
        image = array_of(std::move(read));
        if (files.previous.empty()) return;
        if (!is_regular_file(files.previous)) {
            throw BadImage("no previous segmentation of this case: " + files.previous + " is missing");
        }
        const images::Image labels =
            as_ours([&] { return images::read_segmentation(files.previous, bundle.reader_writer, options); });
        previous.resize(static_cast<std::size_t>(labels.size()));
        for (std::size_t i = 0; i < previous.size(); ++i)
            previous[i] = static_cast<std::int32_t>(labels.voxels_CZYX[i]);
        image.previous_shape = {labels.shape_CZYX[1], labels.shape_CZYX[2], labels.shape_CZYX[3]};
    });
    if (!files.previous.empty()) image.previous = previous.data();
    timed(made.times.preprocess_s, [&] { made.preprocessed = model.preprocess(std::move(image)); });
    return made;
}

Inferred infer_case(const Model& model, LoadedCase& from, const Progress& progress, bool probabilities) {
    return model.infer(from.preprocessed, from.times, progress, probabilities);
}

void finish_case(const Model& model, LoadedCase& from, Inferred inferred, const std::string& output,
                 const Outputs& outputs, const Cleanup& cleanup) {
    const Bundle& bundle = model.bundle();
    LabelMap map;
    timed(from.times.postprocess_s, [&] {
        map = model.labels_in_image(inferred);
        if (!cleanup.is_nothing()) clean(map, cleanup, from.spacing, model.threads());
    });
    timed(from.times.write_s, [&] {
        as_ours([&] {
            if (inferred.probabilities) {
                const Array4<float> values =
                    to_image(std::move(*inferred.probabilities), bundle.transpose_backward, model.threads());
                images::write_probabilities(outputs.probabilities(output), values.values.get(),
                                            {values.count, values.shape[0], values.shape[1], values.shape[2]});
            }
            for (std::size_t format = outputs.formats().size(); format-- > 0;) {  // the first one last
                const std::string file = outputs.file(output, format);
                if (outputs.formats()[format] == "dicom-seg") {
                    outputs.segmentation()->write(from.name, map, *from.header, *from.series, file);
                    continue;
                }
                std::visit([&](const auto& array) {
                    images::write_labels(file, images::Labels(array.values.get(), array.shape), *from.header);
                }, map);
            }
        });
    });
}

}  // namespace fastnnunet::engine
