// MetaImage: .mha, and .mhd with its voxels in a file beside it.

#include <algorithm>
#include <cmath>
#include <set>

#include "image.hpp"
#include "text.hpp"
#include "text_headers.hpp"

namespace fastnnunet::images {
namespace {

const std::set<std::string> kVectors{"ElementSpacing", "ElementSize", "Offset",
                                     "Position",       "Origin",      "CenterOfRotation"};
const std::set<std::string> kMatrices{"TransformMatrix", "Rotation", "Orientation"};
// What decides where voxels are and how many; others may say what they like, and twice
const std::set<std::string> kOthers{"ObjectType", "NDims", "ElementType", "ElementNumberOfChannels", "HeaderSize",
                                    "BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData",
                                    "CompressedDataSize"};
const std::map<std::string, Kind> kTypes{
    {"MET_CHAR", Kind::i8},   {"MET_UCHAR", Kind::u8},       {"MET_SHORT", Kind::i16},      {"MET_USHORT", Kind::u16},
    {"MET_INT", Kind::i32},   {"MET_UINT", Kind::u32},       {"MET_LONG", Kind::i32},       {"MET_ULONG", Kind::u32},
    {"MET_FLOAT", Kind::f32}, {"MET_LONG_LONG", Kind::i64},  {"MET_ULONG_LONG", Kind::u64}, {"MET_DOUBLE", Kind::f64},
};

bool is_counted(const std::string& name) { return kVectors.count(name) || kMatrices.count(name) || name == "DimSize"; }

bool is_true(const std::string& text) { return !text.empty() && (text[0] == 'T' || text[0] == 't' || text[0] == '1'); }

// `name = value`, or with a colon
bool split(const std::string& line, std::string* name, std::string* value) {
    const std::string text = trimmed(line);
    const std::size_t sign = text.find_first_of("=:", 1);
    if (text.empty() || sign == std::string::npos) return false;
    *name = trimmed(text.substr(0, sign));
    *value = trimmed(text.substr(sign + 1));
    return words_of(*name).size() == 1;
}

void parse(TextHeader& header) {
    while (!header.has("ElementDataFile")) {
        std::string line, name, value;
        bool ended = false;
        const bool is_there = header.line(&line, &ended);
        const bool is_field = split(line, &name, &value);
        const bool is_last = is_field && name == "ElementDataFile" && !header.is_cut();
        if (!is_there || (!ended && !is_last)) header.damaged("it has no line 'ElementDataFile = ...'");
        if (!is_field && trimmed(line).empty()) continue;
        if (!is_field) header.damaged("line " + repr_bytes(line.substr(0, 60)));
        if (!header.has("NDims") && is_counted(name)) header.damaged(name + " before NDims");
        const bool is_known = is_counted(name) || kOthers.count(name);
        if (is_known && header.get(name, value) != value) header.damaged("a second " + name);
        header.fields[name] = value;
    }
    header.check_text();
}

std::vector<double> vector_of(const TextHeader& header, const std::set<std::string>& names, std::size_t count) {
    std::vector<double> out;
    for (const std::string& name : names) {
        if (header.has(name)) out = header.numbers(name, words_of(header.get(name)), count);
    }
    return out;
}

Grid grid_of(const TextHeader& header, int axes) {
    Grid grid = plain_grid(axes);
    const auto n = static_cast<std::size_t>(axes);
    auto spacing = vector_of(header, {"ElementSpacing"}, n);
    if (spacing.empty()) spacing = vector_of(header, {"ElementSize"}, n);
    std::vector<double> origin, rows;
    for (const char* name : {"Offset", "Position", "Origin"}) {  // the last of them counts
        if (header.has(name)) origin = vector_of(header, {name}, n);
    }
    for (const char* name : {"TransformMatrix", "Rotation", "Orientation"}) {
        if (header.has(name)) rows = vector_of(header, {name}, n * n);
    }
    for (int i = 0; i < axes; ++i) {
        if (!spacing.empty()) grid.spacing[i] = spacing[i];
        if (!origin.empty()) grid.origin[i] = origin[i];
        for (int j = 0; j < axes && !rows.empty(); ++j) grid.cosine(j, i) = rows[i * axes + j];
    }
    settle(grid, header.path());
    return grid;
}

}  // namespace

bool is_metaimage(const std::string& path) {
    const std::string lower = lowered(path);
    return ends_with(lower, ".mha") || ends_with(lower, ".mhd");
}

ItkFile read_metaimage(const std::string& path) {
    TextHeader header(path);
    parse(header);
    const std::int64_t axes = header.whole("NDims", header.get("NDims"));
    if (axes < 1 || axes > 10) header.damaged("NDims = " + std::to_string(axes));
    const auto n = static_cast<std::size_t>(axes);
    for (const std::string& name : kVectors) vector_of(header, {name}, n);
    for (const std::string& name : kMatrices) vector_of(header, {name}, n * n);
    const auto sizes = header.sizes("DimSize", header.get("DimSize"), axes);
    const auto kind = kTypes.find(header.get("ElementType"));
    if (kind == kTypes.end()) header.damaged("ElementType = " + header.get("ElementType"));
    const auto channels = header.whole("ElementNumberOfChannels", header.get("ElementNumberOfChannels", "1"));
    if (channels != 1) {
        throw ImageError(path + " has " + std::to_string(channels) +
                         " values per voxel, expected one; make a file of each");
    }
    Layout layout;
    layout.kind = kind->second;
    layout.big_endian = is_true(header.get("BinaryDataByteOrderMSB")) || is_true(header.get("ElementByteOrderMSB"));
    Place place;
    const std::string data = header.get("ElementDataFile");
    place.data_file = lowered(data) == "local" ? "" : data;
    place.skip = header.whole("HeaderSize", header.get("HeaderSize", "0"));
    if (is_true(header.get("CompressedData"))) {
        place.packing = Packing::zlib;
        place.packed_bytes = header.whole("CompressedDataSize", header.get("CompressedDataSize"));
        if (place.packed_bytes < 0) header.damaged("CompressedDataSize = " + std::to_string(place.packed_bytes));
    }
    if (!is_true(header.get("BinaryData"))) {
        throw ImageError(path + " has voxels written as text, which this engine does not read; convert it first");
    }
    check_one_file(path, data);
    check_axes(path, axes);
    ItkFile out;
    out.grid = grid_of(header, static_cast<int>(axes));
    out.volume = read_placed(header, place, sizes, layout);
    return out;
}

void write_metaimage(const std::string& path, const Grid& grid, const std::vector<std::int64_t>& sizes_xyz,
                     const SmallestLabels& labels) {
    const int axes = grid.axes;
    const auto packed = labels.bytes_after({}, Packing::zlib);
    const bool is_local = !ends_with(lowered(path), ".mhd");
    const std::string voxels = beside(path, ".zraw");
    const auto list = [](const auto& values, int count, const auto& text) {
        std::string out;
        for (int i = 0; i < count; ++i) out += " " + text(values[i]);
        return out;
    };
    std::vector<double> rows;
    for (int i = 0; i < axes; ++i) {
        for (int j = 0; j < axes; ++j) rows.push_back(grid.cosine(j, i));
    }
    std::string orientation = "??";
    if (axes == 3) {
        const Orientation nearest = orientation_of(grid);
        for (int i = 0; i < 3; ++i) {  // where an axis comes from
            const char letter = nearest.against[i] ? "LPS"[nearest.axis[i]] : "RAI"[nearest.axis[i]];
            orientation = (i == 0 ? "" : orientation) + letter;
        }
    }
    const auto whole = [](std::int64_t value) { return std::to_string(value); };
    const std::string sizes = "DimSize =" + list(sizes_xyz, axes, whole) + "\n";
    const std::string spacing = "ElementSpacing =" + list(grid.spacing, axes, exact) + "\n";
    const std::string runs = "AnatomicalOrientation = " + orientation + "\n";
    const std::string header =
        "ObjectType = Image\nNDims = " + std::to_string(axes) +
        "\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = True\nCompressedDataSize = " +
        std::to_string(packed.size()) + "\nTransformMatrix =" + list(rows, axes * axes, exact) + "\nOffset =" +
        list(grid.origin, axes, exact) + "\nCenterOfRotation =" + list(std::array<double, 4>{}, axes, exact) + "\n" +
        (axes == 3 ? runs + spacing + sizes : spacing + sizes + runs) + "ElementType = " +
        (labels.get().bytes == 1 ? "MET_UCHAR" : "MET_USHORT") + "\nElementDataFile = " +
        (is_local ? "LOCAL" : name_of(voxels)) + "\n";
    std::vector<std::uint8_t> content(header.begin(), header.end());
    if (is_local) {
        content.insert(content.end(), packed.begin(), packed.end());
    } else {
        write_file(voxels, packed);  // what is asked for comes last
    }
    write_file(path, content);
}

}  // namespace fastnnunet::images
