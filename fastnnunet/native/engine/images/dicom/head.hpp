// The header of a DICOM file, as far as it says what the file is, where its slice lies and how its pixels are stored;
// read without a library, of files with and without preamble, in explicit or implicit encoding, of either byte order.
// Layout: DICOM PS3.5 7.1 (elements), 7.5 (sequences), PS3.10 7.1 (preamble).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../stored.hpp"

namespace fastnnunet::images {

// What a file says of itself; empty or 0 where it says nothing. Positions and spacings in mm.
struct DicomHead {
    bool is_whole = true;  // read up to the pixels or the end
    bool has_preamble = true;
    std::string transfer_syntax, storage_class, sop_uid, study_uid, series_uid, frame_uid, modality, description;
    std::vector<std::string> image_type;
    int samples = 1;
    std::int64_t frames = 1;
    int rows = 0, columns = 0;
    std::vector<double> position, orientation, pixel_spacing;
    std::int64_t pixels_at = -1;    // offset in the file; -1: there are none
    std::int64_t pixel_bytes = -1;  // -1: compressed, or there are none
    // how a pixel is stored
    bool has_plain_pixels = false;  // 7FE0,0010: not floating point, nor what a header of frames describes
    bool big_endian = false;
    int bits_allocated = 0, bits_stored = 0, high_bit = 0, is_signed = 0;
    std::string slope, intercept;   // as written
    bool has_value_mapping = false;  // of MR: other values than the stored ones, which not everybody applies

    bool is_image() const { return rows > 0 && columns > 0 && pixels_at >= 0; }
    bool is_localizer() const;
};

// None for a file that is no DICOM. Throws ImageError when the file cannot be read at all.
std::optional<DicomHead> read_dicom_head(const std::string& path);

// Values of a decimal string, some with a decimal comma; empty where one is no number
std::vector<double> decimals(const std::string& text);

}  // namespace fastnnunet::images
