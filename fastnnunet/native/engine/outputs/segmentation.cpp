#include "outputs/segmentation.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <set>

#include "backends/plugins.hpp"
#include "bundle/file.hpp"
#include "error.hpp"
#include "images/grid.hpp"
#include "images/linear.hpp"

namespace fastnnunet::engine {
namespace {

namespace fs = std::filesystem;
using images::Affine;

constexpr double kSamePlace = 0.1;  // of a voxel: how far a corner may lie from where the series has it

const fastnnunet_seg_writer* open_writer(const std::string& plugins) {
    const std::string file = "libfastnnunet_dicomseg.so";
    std::string places;
    for (const std::string& folder : plugin_folders(plugins)) {
        const std::string path = joined(folder, file);
        places += "\n  - " + folder;
        if (!is_regular_file(path)) continue;
        void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // for good
        if (library == nullptr) throw SpecError("--output-format dicom-seg: " + path + " does not load: " + dlerror());
        const auto entry = reinterpret_cast<fastnnunet_seg_entry>(dlsym(library, FASTNNUNET_SEG_ENTRY));
        const fastnnunet_seg_writer* writer = entry == nullptr ? nullptr : entry();
        if (writer == nullptr || writer->interface_version != FASTNNUNET_DICOM_SEG_INTERFACE) {
            throw SpecError("--output-format dicom-seg: " + path + " is of another version of this engine\n" +
                            "install the two together");
        }
        return writer;
    }
    throw SpecError("--output-format dicom-seg: this build of the engine does not write it, " + file +
                    " is in none of its folders" + places +
                    "\nbuild it with DCMTK (-DFASTNNUNET_DCMTK=ON; Debian: libdcmtk-dev), or use `fastnnunet predict`");
}

// Column, row and number of a slice (from 0) to mm, LPS
Affine affine_of(const images::DicomSlices& series) {
    const images::DicomHead &first = series.slices.front().second, &last = series.slices.back().second;
    const auto& o = first.orientation;
    const auto count = static_cast<double>(series.slices.size() - 1);
    const double normal[3] = {o[1] * o[5] - o[2] * o[4], o[2] * o[3] - o[0] * o[5], o[0] * o[4] - o[1] * o[3]};
    Affine affine = images::identity<4>();
    for (int i = 0; i < 3; ++i) {
        affine[i][0] = o[i] * first.pixel_spacing[1];
        affine[i][1] = o[3 + i] * first.pixel_spacing[0];
        affine[i][2] = count > 0 ? (last.position[i] - first.position[i]) / count : normal[i];
        affine[i][3] = first.position[i];
    }
    return affine;
}

// The axis of `to` that each axis of `from` is nearest to, and whether it runs against it: the largest part of every
// row of to^-1 from
images::Turn turn_between(const Affine& from, const Affine& to) {
    const auto column = [](const Affine& m, int i) { return std::array<double, 3>{m[0][i], m[1][i], m[2][i]}; };
    const auto cross = [](const auto& a, const auto& b) {
        return std::array<double, 3>{a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
    };
    const auto dot = [](const auto& a, const auto& b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; };
    images::Turn turn;
    for (int axis = 0; axis < 3; ++axis) {
        const auto row = cross(column(to, (axis + 1) % 3), column(to, (axis + 2) % 3));  // of the inverse, scaled
        const double scale = dot(row, column(to, axis));
        double largest = 0;
        for (int other = 0; other < 3; ++other) {
            const double part = dot(row, column(from, other)) / scale;
            if (std::fabs(part) <= std::fabs(largest)) continue;
            largest = part;
            turn.from[axis] = other;
        }
        turn.flipped[axis] = largest < 0;
    }
    return turn;
}

// Whether no corner of a grid lies farther from where the other has it than a part of a voxel
bool same_grid(const Affine& one, const Affine& other, const std::array<std::int64_t, 3>& sizes_xyz) {
    double voxel = INFINITY, farthest = 0;
    for (int j = 0; j < 3; ++j) {
        voxel = std::min(voxel, images::length(images::length(one[0][j], one[1][j]), one[2][j]));
    }
    for (int corner = 0; corner < 8; ++corner) {
        for (int i = 0; i < 3; ++i) {
            double way = one[i][3] - other[i][3];
            for (int j = 0; j < 3; ++j) {
                if (corner >> j & 1) way += (one[i][j] - other[i][j]) * static_cast<double>(sizes_xyz[j] - 1);
            }
            farthest = std::max(farthest, std::fabs(way));
        }
    }
    return farthest <= kSamePlace * voxel;
}

// A label map (slice, row, column) of the series, whichever way its own axes run
template <class T>
Array3<T> on_slices(const std::string& name, const Array3<T>& labels, const Affine& affine,
                    const SegmentedSeries& series) {
    const std::array<std::int64_t, 3> sizes{labels.shape[2], labels.shape[1], labels.shape[0]};
    const images::DicomHead& first = series.found.slices.front().second;
    const std::array<std::int64_t, 3> wanted{first.columns, first.rows,
                                             static_cast<std::int64_t>(series.found.slices.size())};
    const Affine of_series = affine_of(series.found);
    const images::Turn turn = turn_between(affine, of_series);
    const std::set<int> axes(turn.from.begin(), turn.from.end());
    if (axes.size() == 3 && images::turned_sizes(sizes, turn) == wanted) {
        Affine moved = affine;
        for (int i = 0; i < 3; ++i) {
            for (int axis = 0; axis < 3; ++axis) {
                const double step = affine[i][turn.from[axis]];
                moved[i][axis] = turn.flipped[axis] ? -step : step;
                if (turn.flipped[axis]) moved[i][3] += step * static_cast<double>(wanted[axis] - 1);
            }
        }
        if (same_grid(of_series, moved, wanted)) {
            Array3<T> turned({wanted[2], wanted[1], wanted[0]});
            images::turn_voxels(labels.values.get(), sizes, sizeof(T), turn, turned.values.get());
            return turned;
        }
    }
    throw BadImage(name + ": a label map of shape " + tuple_text(labels.shape) +
                   " (z, y, x) does not lie on the slices of " + series.folder + ", " +
                   tuple_text(Index{wanted[2], wanted[1], wanted[0]}) +
                   " (slice, row, column); give the series that was predicted");
}

}  // namespace

SegmentationWriter::SegmentationWriter(const Bundle& bundle, bool is_label_map, const std::string& plugins)
    : plugin_(open_writer(plugins)),
      model_(bundle.name),
      is_label_map_(is_label_map),
      structures_(named_labels(bundle.labels)) {
    if (is_regular_file(joined(bundle.folder, "label_codes.yaml"))) {
        throw SpecError(
            "--output-format dicom-seg: the bundle has codes of its own, label_codes.yaml, which this program "
            "does not read\nuse `fastnnunet predict`");
    }
    std::set<std::int64_t> seen;
    for (const NamedLabels& structure : structures_) {
        for (const std::int64_t label : structure.labels) {
            if (seen.insert(label).second || !is_label_map) continue;
            throw SpecError(
                "--segmentation-type labelmap: regions of this model overlap, and a voxel of a label map has one "
                "label\n"
                "leave the option out: binary segments may overlap");
        }
    }
}

void SegmentationWriter::refuse_other_than_series(const std::string& name) {
    throw BadImage(name +
                   " is no DICOM series, which a DICOM SEG has to refer to\n"
                   "give the folder of its DICOM slices as the image, or another format than dicom-seg: nifti, mesh");
}

SegmentedSeries SegmentationWriter::check(const std::string& name, const std::vector<std::string>& channels,
                                          const std::string& series_uid, std::vector<std::string>& warnings) const {
    const auto is_series = [](const std::string& path) { return is_folder(path); };
    const auto folder = std::find_if(channels.begin(), channels.end(), is_series);
    if (folder == channels.end()) refuse_other_than_series(name);
    SegmentedSeries series;
    series.folder = *folder;
    try {
        series.found = images::find_slices(*folder, series_uid);
        images::check_slices(*folder, series.found);
    } catch (const images::ImageError& e) {
        throw BadImage(e.what());
    }
    for (const auto& slice : series.found.slices) {
        const images::DicomHead& head = slice.second;
        const char* lacks = head.position.size() != 3        ? "ImagePositionPatient"
                            : head.orientation.size() != 6   ? "ImageOrientationPatient"
                            : head.pixel_spacing.size() != 2 ? "PixelSpacing"
                                                             : nullptr;
        if (lacks == nullptr) continue;
        throw BadImage(series.folder + ": the slices have no " + lacks +
                       ", which a DICOM object must share with them\n" +
                       "leave dicom-seg and rtstruct out of --output-format");
    }
    const fastnnunet_seg_said said = run(name, series, nullptr, "");
    if (said.mended[0] != '\0') warnings.push_back(series.folder + ": mended for the DICOM SEG: " + said.mended);
    return series;
}

void SegmentationWriter::write(const std::string& name, const LabelMap& labels, const images::Header& header,
                               const SegmentedSeries& series, const std::string& file) const {
    const Affine affine = images::affine_of(header);
    const LabelMap turned =
        std::visit([&](const auto& map) { return LabelMap(on_slices(name, map, affine, series)); }, labels);
    static std::atomic<unsigned> count{0};
    const std::string partial = (fs::path(file).parent_path() /
                                 (".partial-" + std::to_string(getpid()) + "-" + std::to_string(count.fetch_add(1))))
                                    .string();
    std::error_code error;
    try {
        run(name, series, &turned, partial);
    } catch (...) {
        fs::remove(partial, error);
        throw;
    }
    fs::rename(partial, file, error);
    if (!error) return;
    const std::string why = error.message();
    fs::remove(partial, error);
    throw NoRoomError("cannot write " + file + ": " + why);
}

bool SegmentationWriter::is_whole(const std::string& file) const {
    fastnnunet_seg_said said;
    return plugin_->check_whole(file.c_str(), &said) == 0;
}

// Throws BadImage.
fastnnunet_seg_said SegmentationWriter::run(const std::string& name, const SegmentedSeries& series,
                                            const LabelMap* labels, const std::string& file) const {
    std::vector<fastnnunet_seg_slice> slices;
    for (const auto& [path, head] : series.found.slices) {
        fastnnunet_seg_slice slice{path.c_str(),
                                   head.storage_class.c_str(),
                                   head.sop_uid.c_str(),
                                   head.study_uid.c_str(),
                                   head.series_uid.c_str(),
                                   head.frame_uid.c_str(),
                                   head.modality.c_str(),
                                   {}};
        std::copy(head.position.begin(), head.position.end(), slice.position_mm);
        slices.push_back(slice);
    }
    std::vector<std::vector<std::uint16_t>> values;
    std::vector<fastnnunet_seg_structure> structures;
    for (const NamedLabels& structure : structures_) {
        values.emplace_back(structure.labels.begin(), structure.labels.end());
        structures.push_back(
            {structure.name.c_str(), values.back().data(), static_cast<std::int64_t>(values.back().size())});
    }
    const images::DicomHead& first = series.found.slices.front().second;
    fastnnunet_seg request{};
    request.struct_size = sizeof request;
    request.folder = series.folder.c_str();
    request.slices = slices.data();
    request.slice_count = static_cast<std::int64_t>(slices.size());
    std::copy(first.orientation.begin(), first.orientation.end(), request.orientation);
    std::copy(first.pixel_spacing.begin(), first.pixel_spacing.end(), request.pixel_spacing_mm);
    request.rows = first.rows;
    request.columns = first.columns;
    request.structures = structures.data();
    request.structure_count = static_cast<std::int64_t>(structures.size());
    request.model = model_.c_str();
    request.version = FASTNNUNET_VERSION;
    request.is_label_map = is_label_map_;
    request.file = file.c_str();
    if (labels != nullptr) {
        std::visit(
            [&](const auto& map) {
                request.labels = map.values.get();
                request.bytes_per_voxel = static_cast<std::int32_t>(sizeof map.values[0]);
            },
            *labels);
    }
    fastnnunet_seg_said said;
    if (plugin_->write(&request, &said) != 0) {
        throw BadImage(labels == nullptr ? said.error : "cannot write the DICOM SEG of " + name + ": " + said.error);
    }
    return said;
}

}  // namespace fastnnunet::engine
