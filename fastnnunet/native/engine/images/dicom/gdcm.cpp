// Slices that only GDCM should read: compressed ones, and those whose values are scaled in the ways of their kind.

#include <gdcmImageHelper.h>
#include <gdcmImageReader.h>
#include <gdcmRescaler.h>

#include <vector>

#include "../image.hpp"
#include "../text.hpp"
#include "series.hpp"

namespace fastnnunet::images {
namespace {

Kind kind_of(const gdcm::PixelFormat& format, const std::string& path) {
    switch (format.GetScalarType()) {
        case gdcm::PixelFormat::UINT8: return Kind::u8;
        case gdcm::PixelFormat::INT8: return Kind::i8;
        case gdcm::PixelFormat::UINT12:
        case gdcm::PixelFormat::UINT16: return Kind::u16;
        case gdcm::PixelFormat::INT12:
        case gdcm::PixelFormat::INT16: return Kind::i16;
        case gdcm::PixelFormat::UINT32: return Kind::u32;
        case gdcm::PixelFormat::INT32: return Kind::i32;
        case gdcm::PixelFormat::FLOAT32: return Kind::f32;
        case gdcm::PixelFormat::FLOAT64: return Kind::f64;
        default: throw ImageError(name_of(path) + ": pixels of a type that is no number");
    }
}

}  // namespace

std::array<double, 3> read_slice_by_gdcm(const std::string& path, const DicomHead& head, float* into) {
    gdcm::ImageReader reader;
    reader.SetFileName(path.c_str());
    if (!reader.Read()) throw ImageError(name_of(path) + ": GDCM cannot read it");
    const gdcm::Image& image = reader.GetImage();
    const unsigned* sizes = image.GetDimensions();
    const bool is_plane = image.GetNumberOfDimensions() == 2 || sizes[2] == 1;
    if (!is_plane || static_cast<int>(sizes[0]) != head.columns || static_cast<int>(sizes[1]) != head.rows ||
        image.GetPixelFormat().GetSamplesPerPixel() != 1) {
        throw ImageError(name_of(path) + ": GDCM has another size of it than its header says");
    }
    std::vector<char> stored(image.GetBufferLength());
    if (!image.GetBuffer(stored.data())) throw ImageError(name_of(path) + ": GDCM cannot decode its pixels");
    gdcm::Rescaler rescaler;
    rescaler.SetIntercept(image.GetIntercept());
    rescaler.SetSlope(image.GetSlope());
    rescaler.SetPixelFormat(image.GetPixelFormat());
    const gdcm::PixelFormat scaled(rescaler.ComputeInterceptSlopePixelType());
    const std::int64_t count = std::int64_t{head.rows} * head.columns;
    Layout layout;
    layout.big_endian = false;  // GDCM swaps to this machine's order
    std::vector<char> values(static_cast<std::size_t>(count) * scaled.GetPixelSize());
    if (image.GetSlope() == 1 && image.GetIntercept() == 0) {
        layout.kind = kind_of(image.GetPixelFormat(), path);
        values = std::move(stored);
    } else {
        layout.kind = kind_of(scaled, path);
        if (!rescaler.Rescale(values.data(), stored.data(), stored.size())) {
            throw ImageError(name_of(path) + ": GDCM cannot rescale its pixels");
        }
    }
    if (static_cast<std::int64_t>(values.size()) < count * bytes_of(layout.kind)) {
        throw ImageError(name_of(path) + ": it has fewer pixels than its header says");
    }
    to_floats(reinterpret_cast<const std::uint8_t*>(values.data()), count, layout, into);
    return {image.GetSpacing(0), image.GetSpacing(1), image.GetSpacing(2)};
}

}  // namespace fastnnunet::images
