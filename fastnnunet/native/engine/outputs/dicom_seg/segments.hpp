// What of a label map each segment is, and its colour.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "outputs/dicom_seg/plugin.h"

namespace fastnnunet::dicom_seg {

// A frame: a slice, and the structures (from 0) whose voxels it holds; of a label map those of all
struct Frame {
    std::int64_t slice;
    std::int64_t structure;
};

// What of a label map each structure is
class Segments {
public:
    explicit Segments(const fastnnunet_seg& from) : from_(from) {
        for (std::int64_t s = 0; s < from.structure_count; ++s) {
            const fastnnunet_seg_structure& structure = from.structures[s];
            is_of_.emplace_back(kLabels, false);
            for (std::int64_t i = 0; i < structure.value_count; ++i) is_of_.back()[structure.values[i]] = true;
        }
        for (std::size_t label = 0; label < kLabels; ++label) {
            for (std::size_t s = 0; s < is_of_.size(); ++s) {
                if (is_of_[s][label]) number_of_[label] = static_cast<std::uint16_t>(s + 1);
            }
        }
        find();
    }

    std::int64_t pixels() const { return std::int64_t{from_.rows} * from_.columns; }
    bool is_of(std::int64_t structure, unsigned label) const {
        return is_of_[static_cast<std::size_t>(structure)][label];
    }
    unsigned number_of(unsigned label) const { return number_of_[label]; }  // of its structure from 1; 0: of none
    // Whether a voxel is of several
    bool overlap() const { return overlap_; }
    const std::vector<Frame>& frames() const { return frames_; }

    unsigned label(std::int64_t slice, std::int64_t pixel) const {
        const std::int64_t at = slice * pixels() + pixel;
        if (from_.labels == nullptr) return 0;
        if (from_.bytes_per_voxel == 1) return static_cast<const std::uint8_t*>(from_.labels)[at];
        return static_cast<const std::uint16_t*>(from_.labels)[at];
    }

private:
    static constexpr std::size_t kLabels = 65536;

    // Those that are not empty; all where there is no other. From the last slice to the first, as highdicom has them.
    void find() {
        const std::int64_t per_slice = from_.is_label_map != 0 ? 1 : from_.structure_count;
        std::vector<std::vector<bool>> is_there(static_cast<std::size_t>(from_.slice_count));
        for (std::int64_t slice = 0; slice < from_.slice_count; ++slice) {
            std::vector<bool> seen(kLabels, false);
            for (std::int64_t pixel = 0; pixel < pixels(); ++pixel) seen[label(slice, pixel)] = true;
            std::vector<bool>& there = is_there[static_cast<std::size_t>(slice)];
            there.assign(static_cast<std::size_t>(per_slice), false);
            for (unsigned label = 0; label < kLabels; ++label) {
                if (!seen[label]) continue;
                int structures = 0;
                for (std::int64_t s = 0; s < from_.structure_count; ++s) {
                    if (!is_of(s, label)) continue;
                    there[static_cast<std::size_t>(per_slice == 1 ? 0 : s)] = true;
                    ++structures;
                }
                overlap_ = overlap_ || structures > 1;
            }
        }
        const bool is_empty = std::none_of(is_there.begin(), is_there.end(), [](const auto& there) {
            return std::find(there.begin(), there.end(), true) != there.end();
        });
        for (std::int64_t s = 0; s < per_slice; ++s) {
            for (std::int64_t slice = from_.slice_count; slice-- > 0;) {
                if (is_empty || is_there[static_cast<std::size_t>(slice)][static_cast<std::size_t>(s)]) {
                    frames_.push_back({slice, s});
                }
            }
        }
    }

    const fastnnunet_seg& from_;
    std::vector<std::vector<bool>> is_of_;
    std::vector<std::uint16_t> number_of_ = std::vector<std::uint16_t>(kLabels, 0);
    std::vector<Frame> frames_;
    bool overlap_ = false;
};

// The colour of the label with this number, L*, a*, b* in 16 bits: as fastnnunet/outputs/colours.py
inline std::array<std::uint16_t, 3> cielab(int number) {
    constexpr int kFirst[][3] = {{0xe6, 0x9f, 0x00}, {0x56, 0xb4, 0xe9}, {0x00, 0x9e, 0x73},
                                 {0xd5, 0x5e, 0x00}, {0xcc, 0x79, 0xa7}, {0xf0, 0xe4, 0x42}};
    constexpr double kGolden = 0.618033988749895;
    constexpr double kSaturation[] = {0.85, 0.6, 0.4}, kValue[] = {0.95, 0.75};
    constexpr double kToXyz[][4] = {{0.4124564, 0.3575761, 0.1804375, 0.95047},
                                    {0.2126729, 0.7151522, 0.0721750, 1.0},
                                    {0.0193339, 0.1191920, 0.9503041, 1.08883}};  // and the white of D65
    double rgb[3];
    if (number <= 6) {
        for (int i = 0; i < 3; ++i) rgb[i] = kFirst[number - 1][i];
    } else {  // HSV
        const double hue = std::fmod(number * kGolden, 1.0) * 6, s = kSaturation[number % 3], v = kValue[number % 2];
        const double part = hue - std::floor(hue), p = v * (1 - s), q = v * (1 - s * part),
                     t = v * (1 - s * (1 - part));
        const double sectors[6][3] = {{v, t, p}, {q, v, p}, {p, v, t}, {p, q, v}, {t, p, v}, {v, p, q}};
        for (int i = 0; i < 3; ++i) rgb[i] = std::nearbyint(255 * sectors[static_cast<int>(hue) % 6][i]);
    }
    double f[3];
    for (int row = 0; row < 3; ++row) {
        double sum = 0;
        for (int i = 0; i < 3; ++i) {
            const double x = rgb[i] / 255;
            sum += kToXyz[row][i] * (x <= 0.04045 ? x / 12.92 : std::pow((x + 0.055) / 1.055, 2.4));
        }
        sum /= kToXyz[row][3];
        const double knee = 6.0 / 29;
        f[row] = sum > knee * knee * knee ? std::cbrt(sum) : sum / (3 * knee * knee) + 4.0 / 29;
    }
    const auto in_16_bits = [](double value, double most) {
        return static_cast<std::uint16_t>(std::nearbyint(std::clamp(value, 0.0, most) / most * 65535));
    };
    return {in_16_bits(116 * f[1] - 16, 100), in_16_bits(500 * (f[0] - f[1]) + 128, 255),
            in_16_bits(200 * (f[1] - f[2]) + 128, 255)};
}

}  // namespace fastnnunet::dicom_seg
