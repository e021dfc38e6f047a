#include "nifti.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "image.hpp"
#include "text.hpp"

namespace fastnnunet::images {
namespace {

constexpr std::size_t kHeaderBytes = 348, kHeaderBytes2 = 540;
constexpr const char* kPairEndings[] = {".img.gz", ".img", ".hdr"};

// Numbers at an offset of a header, in its order of bytes
class Fields {
public:
    Fields(const std::vector<std::uint8_t>& content, bool big_endian) : content_(content), big_(big_endian) {}

    template <class T>
    T get(std::size_t offset) const {
        std::uint64_t bits = 0;
        for (std::size_t i = 0; i < sizeof(T); ++i) {
            bits |= std::uint64_t{content_[offset + i]} << (8 * (big_ ? sizeof(T) - 1 - i : i));
        }
        T value;
        if constexpr (sizeof(T) == 8) {
            std::memcpy(&value, &bits, 8);
        } else if constexpr (sizeof(T) == 4) {
            const auto half = static_cast<std::uint32_t>(bits);
            std::memcpy(&value, &half, 4);
        } else {
            const auto quarter = static_cast<std::uint16_t>(bits);
            std::memcpy(&value, &quarter, 2);
        }
        return value;
    }

    template <class T, class Out>
    void fill(std::size_t offset, Out& values) const {
        for (auto& value : values) {
            value = get<T>(offset);
            offset += sizeof(T);
        }
    }

private:
    const std::vector<std::uint8_t>& content_;
    bool big_;
};

void set_sizes(NiftiHeader& header, const std::array<std::int64_t, 8>& dim) {
    const std::int64_t counted = dim[0] >= 1 && dim[0] <= 7 ? dim[0] : 0;
    const std::int64_t shown = header.version == 1 ? std::clamp<std::int64_t>(dim[0], 0, 7) : counted;
    header.dim.assign(dim.begin(), dim.begin() + shown + 1);
    header.sizes_xyz.assign(dim.begin() + 1, dim.begin() + 1 + counted);
    for (std::size_t i = 3; i < header.sizes_xyz.size(); ++i) {
        if (header.sizes_xyz[i] == 0) header.sizes_xyz[i] = 1;
    }
}

NiftiHeader first_version(const std::vector<std::uint8_t>& content, bool big_endian) {
    const Fields fields(content, big_endian);
    NiftiHeader header;
    header.big_endian = big_endian;
    header.is_analyze = content[344] != 'n' || (content[345] != '+' && content[345] != 'i');
    std::array<std::int64_t, 8> dim{};
    fields.fill<std::int16_t>(40, dim);
    set_sizes(header, dim);
    header.intent = fields.get<std::int16_t>(68);
    header.datatype = fields.get<std::int16_t>(70);
    fields.fill<float>(76, header.pixdim);
    const float offset = fields.get<float>(108);
    header.start = offset >= 0 && offset < 2147483648.0f ? static_cast<std::int64_t>(offset) : -1;
    header.units = content[123];
    header.time_offset = fields.get<float>(136);
    if (header.is_analyze) return header;  // it has other fields in the rest
    header.slope = fields.get<float>(112);
    header.intercept = fields.get<float>(116);
    header.qform_code = fields.get<std::int16_t>(252);
    header.sform_code = fields.get<std::int16_t>(254);
    fields.fill<float>(256, header.qform);
    fields.fill<float>(280, header.sform);
    return header;
}

NiftiHeader second_version(const std::vector<std::uint8_t>& content, bool big_endian) {
    const Fields fields(content, big_endian);
    NiftiHeader header;
    header.version = 2;
    header.big_endian = big_endian;
    std::array<std::int64_t, 8> dim{};
    fields.fill<std::int64_t>(16, dim);
    set_sizes(header, dim);
    header.datatype = fields.get<std::int16_t>(12);
    fields.fill<double>(104, header.pixdim);
    header.start = fields.get<std::int64_t>(168);
    if (header.start < 0 || header.start >= std::int64_t{1} << 62) header.start = -1;
    header.slope = fields.get<double>(176);
    header.intercept = fields.get<double>(184);
    header.qform_code = fields.get<std::int32_t>(344);
    header.sform_code = fields.get<std::int32_t>(348);
    fields.fill<double>(352, header.qform);
    fields.fill<double>(400, header.sform);
    return header;
}

bool kind_of(int datatype, Kind* kind) {
    constexpr std::pair<int, Kind> kKinds[] = {
        {2, Kind::u8},    {4, Kind::i16},   {8, Kind::i32},   {16, Kind::f32},   {64, Kind::f64},
        {256, Kind::i8},  {512, Kind::u16}, {768, Kind::u32}, {1024, Kind::i64}, {1280, Kind::u64},
    };
    for (const auto& [number, known] : kKinds) {
        if (number != datatype) continue;
        *kind = known;
        return true;
    }
    return false;
}

const char* no_numbers(int datatype) {
    switch (datatype) {
        case 32:
        case 1792:
        case 2048: return "complex numbers";
        case 128:
        case 2304: return "colours (RGB)";
        case 1: return "bits";
        default: return nullptr;
    }
}

template <class Values>
void check_finite(const std::string& path, const char* name, const Values& values) {
    if (std::all_of(values.begin(), values.end(), [](double value) { return std::isfinite(value); })) return;
    throw ImageError(path + " has a damaged header: its " + name + " is (" + joined(values, general) +
                     "), expected numbers; export it again");
}

void check(const NiftiHeader& header, const std::string& path, std::int64_t at_least) {
    const auto& sizes = header.sizes_xyz;
    const bool has_size = !sizes.empty() && std::all_of(sizes.begin(), sizes.end(), [](auto n) { return n >= 1; });
    if (!has_size || header.start < at_least) {
        throw ImageError(path + " has a damaged NIfTI header: dimensions " + tuple_text(header.dim) + ", offset " +
                         std::to_string(header.start));
    }
    if (const char* what = no_numbers(header.datatype)) {
        throw ImageError(path + " holds " + what + ", expected one real number per voxel; convert it first");
    }
    if (header.datatype == 1536) {
        throw ImageError(path + " holds numbers of 128 bits, expected at most 64; convert it first");
    }
    Kind kind;
    if (!kind_of(header.datatype, &kind)) {
        throw ImageError(path + " has a damaged NIfTI header: data type " + std::to_string(header.datatype) +
                         "; export it again");
    }
    const std::size_t axes = std::min<std::size_t>(3, sizes.size());
    bool has_spacing = true;
    for (std::size_t i = 0; i < axes; ++i) {
        const double spacing = header.pixdim[i + 1];
        // that of a single voxel is often left at 0, which every reader takes for 1
        has_spacing = has_spacing && std::isfinite(spacing) && (spacing != 0 || sizes[i] == 1);
    }
    if (!has_spacing) {
        const std::vector<double> got(header.pixdim.begin() + 1, header.pixdim.begin() + 1 + axes);
        throw ImageError(path + " has a damaged header: its spacing is (" + joined(got, general) +
                         "), expected millimetres; export it again");
    }
    if (header.qform_code > 0) {
        std::vector<double> values{header.pixdim[0]};
        values.insert(values.end(), header.qform.begin(), header.qform.end());
        check_finite(path, "qform", values);
    }
    if (header.sform_code > 0) check_finite(path, "sform", header.sform);
    const bool is_scaled = std::isfinite(header.slope) && header.slope != 0;
    if (std::isinf(header.slope) || (is_scaled && !std::isfinite(header.intercept))) {
        throw ImageError(path + " has a damaged header: values are rescaled by " + general(header.slope) + " and " +
                         general(header.intercept) + ", expected numbers; export it again");
    }
}

NiftiHeader read_header(Stored& stored, bool single) {
    const std::string& path = stored.path();
    std::vector<std::uint8_t> content = stored.head(kHeaderBytes2);
    if (content.size() < kHeaderBytes) {
        throw ImageError(path + " is not a NIfTI image: " + std::to_string(content.size()) +
                         " bytes, expected a header of 348");
    }
    const std::string magic(content.begin() + 344, content.begin() + 348);
    const std::string magic2(content.begin() + 4, content.begin() + 12);
    const bool is_analyze = !single && magic == std::string(4, '\0');
    for (const bool big_endian : {false, true}) {
        const auto size = Fields(content, big_endian).get<std::int32_t>(0);
        if (size == 348 && (is_analyze || magic == std::string(single ? "n+1\0" : "ni1\0", 4))) {
            NiftiHeader header = first_version(content, big_endian);
            check(header, path, single ? kHeaderBytes : 0);
            return header;
        }
        if (size == 540 && magic2 == std::string(single ? "n+2\0\r\n\x1a\n" : "ni2\0\r\n\x1a\n", 8)) {
            if (content.size() < kHeaderBytes2) {
                throw ImageError(path + " is truncated: its header ends after " + std::to_string(content.size()) +
                                 " bytes");
            }
            NiftiHeader header = second_version(content, big_endian);
            check(header, path, single ? kHeaderBytes2 : 0);
            return header;
        }
    }
    throw ImageError(path + " has a damaged NIfTI header: size " +
                     std::to_string(Fields(content, false).get<std::int32_t>(0)) + " and magic " + repr_bytes(magic) +
                     ", expected 348 and " + (single ? "n+1" : "ni1") + "; export it again");
}

// The files of header and voxels of a pair, given one of them
std::pair<std::string, std::string> halves(const std::string& path) {
    const std::string lower = lowered(path);
    for (const char* ending : kPairEndings) {
        if (!ends_with(lower, ending)) continue;
        const std::string stem = path.substr(0, path.size() - std::string(ending).size());
        if (std::string(ending) != ".hdr") return {stem + ".hdr", path};
        std::error_code failed;
        const auto is_there = [&](const char* half) {
            return std::filesystem::exists(std::filesystem::u8path(stem + half), failed);
        };
        const bool is_packed = !is_there(".img") && is_there(".img.gz");
        return {path, stem + (is_packed ? ".img.gz" : ".img")};
    }
    return {path, path};
}

std::unique_ptr<Stored> detect(File& file) {
    return std::make_unique<Stored>(file, 0, file.is_gzip() ? Packing::gzip : Packing::none);
}

}  // namespace

bool is_nifti(const std::string& path) {
    const std::string lower = lowered(name_of(path));
    return ends_with(lower, ".nii") || ends_with(lower, ".nii.gz");
}

bool is_nifti_pair(const std::string& path) {
    const std::string lower = lowered(name_of(path));
    return std::any_of(std::begin(kPairEndings), std::end(kPairEndings),
                       [&](const char* ending) { return ends_with(lower, ending); });
}

NiftiFile::NiftiFile(const std::string& path) : path_(path) {
    if (!is_nifti_pair(path)) {
        voxel_file_ = std::make_unique<File>(path);
        voxel_stored_ = detect(*voxel_file_);
        header_ = read_header(*voxel_stored_, true);
        return;
    }
    const auto [header_path, voxel_path] = halves(path);
    header_file_ = std::make_unique<File>(header_path);
    header_stored_ = detect(*header_file_);
    header_ = read_header(*header_stored_, false);
    voxel_file_ = std::make_unique<File>(voxel_path);
    voxel_stored_ = detect(*voxel_file_);
}

Volume NiftiFile::read(const Rescale& rescale) {
    Layout layout;
    kind_of(header_.datatype, &layout.kind);
    layout.big_endian = header_.big_endian;
    layout.rescale = rescale;
    return read_volume(*voxel_stored_, header_.start, header_.sizes_xyz, layout);
}

}  // namespace fastnnunet::images
