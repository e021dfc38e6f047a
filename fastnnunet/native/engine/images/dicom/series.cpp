#include "series.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "../image.hpp"
#include "../text.hpp"

namespace fastnnunet::images {
namespace {

using Vector = std::array<double, 3>;

#ifdef FASTNNUNET_GDCM
constexpr bool kHasGdcm = true;
#else
constexpr bool kHasGdcm = false;
#endif
constexpr double kOffGrid = 0.05;      // of the spacing: how far a slice may lie from where a regular grid has it
constexpr double kHalfPixel = 0.5;     // how far the last slice may be shifted sideways against the first
constexpr double kSameCosine = 1e-4;   // also of pixel spacings

Vector position_of(const DicomHead& head) { return {head.position[0], head.position[1], head.position[2]}; }
double dot(const Vector& a, const Vector& b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
Vector difference(const Vector& a, const Vector& b) { return {a[0] - b[0], a[1] - b[1], a[2] - b[2]}; }
double length(const Vector& a) { return std::sqrt(dot(a, a)); }
Vector normal_of(const DicomHead& head) {
    const auto& o = head.orientation;
    return {o[1] * o[5] - o[2] * o[4], o[2] * o[3] - o[0] * o[5], o[0] * o[4] - o[1] * o[3]};
}

std::string fixed(double value, int digits) {
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", digits, value);
    return text;
}

std::string tuple_of(const std::vector<double>& values) {
    return "(" + joined(values, repr) + (values.size() == 1 ? ",)" : ")");
}

bool is_close(double a, double b, double relative, double absolute) {
    return std::fabs(a - b) <= absolute + relative * std::fabs(b);
}

void check_sizes(const std::string& folder, const DicomSlices& series) {
    std::map<std::pair<int, int>, int> counts;
    for (const auto& slice : series.slices) ++counts[{slice.second.rows, slice.second.columns}];
    if (counts.size() == 1) return;
    std::pair<int, int> usual, other;
    int most = 0;
    for (const auto& slice : series.slices) {  // of equally many those that come first
        const std::pair<int, int> size{slice.second.rows, slice.second.columns};
        if (counts[size] > most) {
            most = counts[size];
            usual = size;
        }
    }
    std::vector<std::string> odd;
    for (const auto& slice : series.slices) {
        const std::pair<int, int> size{slice.second.rows, slice.second.columns};
        if (size == usual) continue;
        if (odd.empty()) other = size;
        odd.push_back(name_of(slice.first));
    }
    const std::size_t count = odd.size();
    odd.resize(std::min<std::size_t>(3, count));
    throw ImageError(folder + ": " + std::to_string(count) + " of " + std::to_string(series.slices.size()) +
                     " slices have " + std::to_string(other.first) + " x " + std::to_string(other.second) +
                     " pixels (rows x columns) instead of " + std::to_string(usual.first) + " x " +
                     std::to_string(usual.second) + ": " + joined(odd, [](const std::string& name) { return name; }) +
                     "\nexpected slices of one size; take the others out of the folder, or export the series again");
}

std::string uneven(const DicomSlices& series, const std::vector<double>& gaps) {
    std::vector<double> sorted = gaps;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t half = sorted.size() / 2;
    const double usual = sorted.size() % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
    std::size_t index = 0;
    double missing = 0, off = 0;
    for (std::size_t i = 0; i < gaps.size(); ++i) {
        if (std::fabs(gaps[i] - usual) > std::fabs(gaps[index] - usual)) index = i;
        const double steps = gaps[i] / usual;
        missing += std::nearbyint(steps) - 1;
        off = std::max(off, std::fabs(steps - std::nearbyint(steps)));
    }
    const std::string between = "between " + name_of(series.slices[index].first) + " and " +
                                name_of(series.slices[index + 1].first);
    if (off < 0.1 && missing < static_cast<double>(gaps.size())) {
        return fixed(missing, 0) + " slice(s) are missing: " + fixed(gaps[index], 2) + " mm " + between +
               ", expected " + fixed(usual, 2) + " mm as elsewhere";
    }
    return "the slices are not evenly spaced: " + fixed(sorted.front(), 2) + " to " + fixed(sorted.back(), 2) +
           " mm, the odd one " + between + ", expected one distance";
}

void check_places(const std::string& folder, const DicomSlices& series, const Vector& normal, double pixel_mm) {
    const auto& slices = series.slices;
    const Vector first = position_of(slices[0].second);
    std::vector<double> heights, gaps;
    for (const auto& slice : slices) heights.push_back(dot(difference(position_of(slice.second), first), normal));
    for (std::size_t i = 1; i < heights.size(); ++i) gaps.push_back(heights[i] - heights[i - 1]);
    const double spacing = heights.back() / static_cast<double>(gaps.size());
    const auto least = std::min_element(gaps.begin(), gaps.end(),
                                        [](double a, double b) { return std::fabs(a) < std::fabs(b); });
    if (std::fabs(*least) < 0.01 * std::fabs(spacing) || spacing == 0) {
        const auto index = static_cast<std::size_t>(least - gaps.begin());
        throw ImageError(
            folder + ": " + name_of(slices[index].first) + " and " + name_of(slices[index + 1].first) +
            " are different slices at the same position, expected one image per position (several time points "
            "or echoes?); give each a folder of its own");
    }
    const Vector last = difference(position_of(slices.back().second), first);
    const double sideways = length({last[0] - heights.back() * normal[0], last[1] - heights.back() * normal[1],
                                    last[2] - heights.back() * normal[2]});
    if (sideways > kHalfPixel * pixel_mm) {
        const double tilt = std::atan2(sideways, std::fabs(heights.back())) * 180 / 3.14159265358979323846;
        throw ImageError(
            folder + ": the slices are shifted against each other, " + fixed(sideways, 2) +
            " mm from first to last (a gantry tilt of " + fixed(tilt, 1) +
            " degrees), expected them straight above each other\nresample the series to a rectangular grid "
            "first (dcm2niix does)");
    }
    for (std::size_t i = 0; i < heights.size(); ++i) {
        if (std::fabs(heights[i] - spacing * static_cast<double>(i)) <= kOffGrid * std::fabs(spacing)) continue;
        throw ImageError(folder + ": " + uneven(series, gaps) +
                         "\nexport the whole series, or resample it evenly first");
    }
}

bool is_uncompressed(const DicomHead& head) {
    return head.transfer_syntax.empty() || head.transfer_syntax == "1.2.840.10008.1.2" ||
           head.transfer_syntax == "1.2.840.10008.1.2.1" || head.transfer_syntax == "1.2.840.10008.1.2.2";
}

// Whether pixels and what they mean are so plain that nobody reads them differently
bool is_plain(const DicomHead& head, Rescale* rescale) {
    const bool fills = head.bits_stored == head.bits_allocated || head.bits_allocated == 16;
    if (!head.has_plain_pixels || head.pixel_bytes < 0 || !is_uncompressed(head) || head.samples != 1 ||
        (head.bits_allocated != 8 && head.bits_allocated != 16) || !fills || head.bits_stored < 1 ||
        head.bits_stored > head.bits_allocated || head.high_bit != head.bits_stored - 1 ||
        head.pixel_spacing.size() != 2) {
        return false;
    }
    const auto slope = decimals(head.slope), intercept = decimals(head.intercept);
    rescale->slope = slope.size() == 1 ? slope[0] : 1;
    rescale->intercept = intercept.size() == 1 ? intercept[0] : 0;
    rescale->on = rescale->slope != 1 || rescale->intercept != 0;
    if (!rescale->on) return (head.slope.empty() || slope.size() == 1) && !head.has_value_mapping;
    const bool is_scaled_kind = head.storage_class == "1.2.840.10008.5.1.4.1.1.2" ||  // CT, PET
                                head.storage_class == "1.2.840.10008.5.1.4.1.1.128";
    return is_scaled_kind && slope.size() == 1 && intercept.size() == 1 && rescale->slope != 0;
}

void read_plain(const std::string& path, const DicomHead& head, const Rescale& rescale, float* into) {
    File file(path);
    const std::int64_t count = std::int64_t{head.rows} * head.columns, bytes = head.bits_allocated / 8;
    if (head.pixel_bytes < count * bytes) {
        throw ImageError(name_of(path) + ": " + std::to_string(head.pixel_bytes) + " bytes of pixels, expected " +
                         std::to_string(count * bytes));
    }
    auto raw = file.read(head.pixels_at, static_cast<std::size_t>(count * bytes));
    if (static_cast<std::int64_t>(raw.size()) < count * bytes) throw ImageError(name_of(path) + ": it is truncated");
    Layout layout;
    layout.rescale = rescale;
    if (bytes == 1) {
        layout.kind = head.is_signed ? Kind::i8 : Kind::u8;
    } else {
        layout.kind = head.is_signed ? Kind::i16 : Kind::u16;
        const int unused = 16 - head.bits_stored;  // bits that hold something else
        for (std::int64_t i = 0; i < count; ++i) {
            std::uint8_t* at = raw.data() + 2 * i;
            auto word = static_cast<std::uint16_t>(head.big_endian ? at[0] << 8 | at[1] : at[1] << 8 | at[0]);
            word = static_cast<std::uint16_t>(word << unused);
            word = head.is_signed ? static_cast<std::uint16_t>(static_cast<std::int16_t>(word) >> unused)
                                  : static_cast<std::uint16_t>(word >> unused);
            at[0] = static_cast<std::uint8_t>(word);
            at[1] = static_cast<std::uint8_t>(word >> 8);
        }
    }
    to_floats(raw.data(), count, layout, into);
}

}  // namespace

void check_slices(const std::string& folder, const DicomSlices& series) {
    for (const auto& [path, head] : series.slices) {
        const bool has_frames = head.frames > 1;
        if (!has_frames && head.samples <= 1) continue;
        throw ImageError(path + " has " + (has_frames ? std::to_string(head.frames) + " frames"
                                                      : std::to_string(head.samples) + " colour samples per pixel") +
                         ", expected a grey image of one slice; convert it first");
    }
    check_sizes(folder, series);
    if (series.slices.size() == 1) return;
    for (const auto& [path, head] : series.slices) {
        const char* lacks = head.position.size() != 3      ? "position"
                            : head.orientation.size() != 6 ? "orientation"
                            : head.pixel_spacing.size() != 2 && !head.pixel_spacing.empty() ? "pixel spacing"
                                                                                             : nullptr;
        if (lacks == nullptr) continue;
        throw ImageError(path + " does not say its " + lacks + " in the patient; export the series again");
    }
    const DicomHead& first = series.slices[0].second;
    for (const bool is_spacing : {false, true}) {
        const auto& value = is_spacing ? first.pixel_spacing : first.orientation;
        for (const auto& [path, head] : series.slices) {
            const auto& other = is_spacing ? head.pixel_spacing : head.orientation;
            bool same = value.size() == other.size();
            for (std::size_t i = 0; same && i < value.size(); ++i)
                same = is_close(other[i], value[i], 1e-5, kSameCosine);
            if (same) continue;
            throw ImageError(folder + ": the " + (is_spacing ? "pixel spacing" : "orientation") + " is " +
                             tuple_of(value) + " in " + name_of(series.slices[0].first) + " and " + tuple_of(other) +
                             " in " + name_of(path) +
                             ", expected parallel slices of one kind (is a scout among them?)");
        }
    }
    const auto& o = first.orientation;
    const Vector row{o[0], o[1], o[2]}, column{o[3], o[4], o[5]};
    if (!is_close(dot(row, row), 1, 1e-5, 0.01) || !is_close(dot(column, column), 1, 1e-5, 0.01) ||
        !is_close(dot(row, column), 0, 1e-5, 0.01)) {
        throw ImageError(folder + ": the orientation of the slices is " + tuple_of(o) +
                         ", expected two perpendicular directions of length 1; export the series again");
    }
    double pixel_mm = 1;
    if (!first.pixel_spacing.empty()) pixel_mm = std::min(first.pixel_spacing[0], first.pixel_spacing[1]);
    check_places(folder, series, normal_of(first), pixel_mm);
}

double slice_spacing(const DicomSlices& series) {
    const DicomHead &first = series.slices.front().second, &last = series.slices.back().second;
    const double height = dot(difference(position_of(last), position_of(first)), normal_of(first));
    return std::fabs(height) / static_cast<double>(series.slices.size() - 1);
}

ItkFile read_series(const std::string& folder, const std::string& uid, std::vector<std::string>* warnings) {
    const DicomSlices series = find_slices(folder, uid);
    for (const std::string& note : series.notes) warnings->push_back(folder + ": " + note);
    check_slices(folder, series);
    const DicomHead& first = series.slices[0].second;
    const auto slices = static_cast<std::int64_t>(series.slices.size());
    const std::int64_t in_plane = std::int64_t{first.rows} * first.columns;
    std::int64_t stored = 0;
    for (const auto& slice : series.slices) stored += File(slice.first).size();
    check_claim(folder, in_plane * slices, stored, kDeflateRatio, kSmallBytes);  // a byte a pixel, or more
    ItkFile out;
    out.volume.sizes_xyz = {first.columns, first.rows, slices};
    out.volume.voxels = new_floats(folder, in_plane * slices);
    const auto refuse_spacing = [&] {
        throw ImageError(folder + ": the slices do not say their pixel spacing; export the series again");
    };
    if (slices > 1 && first.pixel_spacing.empty() && !kHasGdcm) refuse_spacing();  // GDCM finds some elsewhere
    Vector spacing{1, 1, 1};
    if (first.pixel_spacing.size() == 2) spacing = {first.pixel_spacing[1], first.pixel_spacing[0], 1};
    for (std::int64_t i = 0; i < slices; ++i) {
        const auto& [path, head] = series.slices[static_cast<std::size_t>(i)];
        float* into = out.volume.voxels.get() + i * in_plane;
        Rescale rescale;
        try {
            if (slices > 1 && is_plain(head, &rescale)) {
                read_plain(path, head, rescale, into);
            } else {
                const auto found = read_slice_by_gdcm(path, head, into);
                if (i == 0 && (first.pixel_spacing.size() != 2 || slices == 1)) spacing = found;
            }
        } catch (const ImageError& error) {
            throw ImageError("cannot read the DICOM series in " + folder + ": " + error.what() +
                             "\nexpected whole slices of one size; export the series again");
        }
    }
    if (slices > 1) {
        if (first.pixel_spacing.empty() && spacing[0] == 1 && spacing[1] == 1) refuse_spacing();
        // as ITK has it, unless that is not the distance of the planes
        const Vector way = difference(position_of(series.slices.back().second), position_of(first));
        spacing[2] = length(way) / static_cast<double>(slices - 1);
        if (!is_close(spacing[2], slice_spacing(series), 1e-4, 1e-8)) spacing[2] = slice_spacing(series);
    }
    out.grid = plain_grid(3);
    for (int i = 0; i < 3; ++i) {
        out.grid.spacing[i] = spacing[i];
        if (first.position.size() == 3) out.grid.origin[i] = first.position[i];
        if (first.orientation.size() != 6) continue;
        out.grid.cosine(i, 0) = first.orientation[i];
        out.grid.cosine(i, 1) = first.orientation[3 + i];
        out.grid.cosine(i, 2) = normal_of(first)[i];
    }
    settle(out.grid, folder);
    for (std::int64_t i = 0; i < out.volume.size(); ++i) out.volume.bad += !std::isfinite(out.volume.voxels[i]);
    return out;
}

#ifndef FASTNNUNET_GDCM
std::array<double, 3> read_slice_by_gdcm(const std::string& path, const DicomHead& head, float*) {
    throw ImageError(
        name_of(path) + ": it is compressed or scaled in a way (transfer syntax " +
        (head.transfer_syntax.empty() ? "unknown" : head.transfer_syntax) +
        ") that this build of the engine does not read; use one with GDCM (-DFASTNNUNET_GDCM=ON), or convert it "
        "first (gdcmconv --raw)");
}
#endif

}  // namespace fastnnunet::images
