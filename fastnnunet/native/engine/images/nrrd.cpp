// NRRD: .nrrd, and .nhdr with its voxels in a file beside it.

#include <algorithm>
#include <cmath>
#include <set>

#include "image.hpp"
#include "text.hpp"
#include "text_headers.hpp"

namespace fastnnunet::images {
namespace {

const std::map<std::string, Kind> kTypes{
    {"signed char", Kind::i8},             {"int8", Kind::i8},
    {"int8_t", Kind::i8},                  {"uchar", Kind::u8},
    {"unsigned char", Kind::u8},           {"uint8", Kind::u8},
    {"uint8_t", Kind::u8},                 {"short", Kind::i16},
    {"short int", Kind::i16},              {"signed short", Kind::i16},
    {"signed short int", Kind::i16},       {"int16", Kind::i16},
    {"int16_t", Kind::i16},                {"ushort", Kind::u16},
    {"unsigned short", Kind::u16},         {"unsigned short int", Kind::u16},
    {"uint16", Kind::u16},                 {"uint16_t", Kind::u16},
    {"int", Kind::i32},                    {"signed int", Kind::i32},
    {"int32", Kind::i32},                  {"int32_t", Kind::i32},
    {"uint", Kind::u32},                   {"unsigned int", Kind::u32},
    {"uint32", Kind::u32},                 {"uint32_t", Kind::u32},
    {"longlong", Kind::i64},               {"long long", Kind::i64},
    {"long long int", Kind::i64},          {"signed long long", Kind::i64},
    {"signed long long int", Kind::i64},   {"int64", Kind::i64},
    {"int64_t", Kind::i64},                {"ulonglong", Kind::u64},
    {"unsigned long long", Kind::u64},     {"unsigned long long int", Kind::u64},
    {"uint64", Kind::u64},                 {"uint64_t", Kind::u64},
    {"float", Kind::f32},                  {"double", Kind::f64},
};

const std::set<std::string> kSpaces{"right-anterior-superior",
                                    "ras",
                                    "right-anterior-superior-time",
                                    "rast",
                                    "left-anterior-superior",
                                    "las",
                                    "left-anterior-superior-time",
                                    "last",
                                    "left-posterior-superior",
                                    "lps",
                                    "left-posterior-superior-time",
                                    "lpst",
                                    "scanner-xyz",
                                    "scanner-xyz-time",
                                    "3d-right-handed",
                                    "3d-right-handed-time",
                                    "3d-left-handed",
                                    "3d-left-handed-time"};
// Of each axis, after their number
const std::set<std::string> kOfAxes{"sizes",    "spacings", "thicknesses", "axismins", "axismaxs", "spacedirections",
                                    "centers",  "centerings", "kinds",     "labels",   "units"};
const std::set<std::string> kOfSpace{"spacedirections", "spaceorigin", "spaceunits", "measurementframe"};
const std::set<std::string> kOthers{"content",        "number",   "type",     "blocksize",   "dimension", "space",
                                    "spacedimension", "min",      "max",      "oldmin",      "oldmax",    "endian",
                                    "encoding",       "lineskip", "byteskip", "sampleunits", "datafile"};

void check_field(const TextHeader& header, const std::string& name, const std::string& as_written) {
    if (!kOfAxes.count(name) && !kOfSpace.count(name) && !kOthers.count(name)) {
        header.damaged("'" + as_written + "' is no field");
    }
    if (header.has(name)) header.damaged("a second '" + as_written + "'");
    if (kOfAxes.count(name) && !header.has("dimension")) header.damaged("'" + as_written + "' before dimension");
    if (kOfSpace.count(name) && !header.has("space") && !header.has("spacedimension")) {
        header.damaged("'" + as_written + "' before space");
    }
}

void parse(TextHeader& header) {
    std::string line;
    bool ended = false, is_first = true;
    while (header.line(&line, &ended)) {
        if (!line.empty() && line.back() == '\r') line.pop_back();
        while (!line.empty() && line.back() == '\r') line.pop_back();
        if (is_first || (!line.empty() && line[0] == '#')) {
            const bool is_known =
                line.size() == 8 && line.compare(0, 7, "NRRD000") == 0 && line[7] >= '1' && line[7] <= '5';
            if (is_first && !is_known) header.damaged("it does not begin with NRRD0001 to NRRD0005");
            is_first = false;
            continue;
        }
        if (line.empty()) break;
        const std::size_t colon = line.find(':');
        if (colon != std::string::npos && colon + 1 < line.size() && line[colon + 1] == '=') continue;  // a user's own
        const std::string before = line.substr(0, colon);
        const bool is_field = colon != std::string::npos && colon > 0 && line.compare(colon, 2, ": ") == 0;
        if (!is_field || before.find('=') != std::string::npos) {
            header.damaged("line " + repr_bytes(line.substr(0, 60)).substr(1));
        }
        std::string name = lowered(trimmed(before));
        name.erase(std::remove(name.begin(), name.end(), ' '), name.end());
        check_field(header, name, before);
        header.fields[name] = trimmed(line.substr(colon + 1));
        const auto words = words_of(header.fields[name]);
        if (name == "datafile" && !words.empty() && words[0] == "LIST") break;
    }
    if (header.is_cut() && header.position() >= std::size_t{1} << 20) {
        header.damaged("it is longer than 1048576 bytes");
    }
    header.check_text();
}

std::vector<std::string> split(const std::string& text, char at) {
    std::vector<std::string> parts(1);
    for (const char c : text) {
        if (c == at) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

// "(1,0,0) (0,1,0) none": a vector for each axis, an empty one for none
std::vector<std::vector<double>> vectors_of(const TextHeader& header, const std::string& text) {
    std::vector<std::vector<double>> out;
    for (std::size_t at = 0; at < text.size();) {
        if (text[at] == ' ' || text[at] == '\t') {
            ++at;
        } else if (lowered(text.substr(at, 4)) == "none") {
            out.emplace_back();
            at += 4;
        } else {
            const std::size_t end = text.find(')', at);
            if (text[at] != '(' || end == std::string::npos) header.damaged("space directions = " + text.substr(0, 60));
            const auto words = split(text.substr(at + 1, end - at - 1), ',');
            out.push_back(header.numbers("space directions and origin", words, words.size()));
            at = end + 1;
        }
    }
    return out;
}

// Signs that turn a space into ITK's
std::vector<double> signs_of(const std::string& space) {
    const auto is = [&](const char* name, const char* letters) { return space == name || space == letters; };
    if (is("right-anterior-superior", "ras") || is("right-anterior-superior-time", "rast")) return {-1, -1, 1, 1};
    if (is("left-anterior-superior", "las") || is("left-anterior-superior-time", "last")) return {1, -1, 1, 1};
    return {1, 1, 1, 1};
}

std::int64_t space_axes(const TextHeader& header, const std::string& space) {
    if (header.has("spacedimension")) return header.whole("space dimension", header.get("spacedimension"));
    if (space.empty()) return 0;
    const bool has_time = ends_with(space, "-time") || (space.size() == 4 && ends_with(space, "t"));
    return has_time ? 4 : 3;
}

Grid grid_of(const TextHeader& header, int axes) {
    Grid grid = plain_grid(axes);
    const std::string& path = header.path();
    const std::string space = lowered(header.get("space"));
    if (!space.empty() && !kSpaces.count(space)) header.damaged("space: " + header.get("space").substr(0, 60));
    const std::vector<double> sign = signs_of(space);
    const std::int64_t in_space = space_axes(header, space);
    const auto spacings = words_of(header.get("spacings"));
    if (header.has("spacings")) {
        if (static_cast<int>(spacings.size()) != axes)
            header.damaged("spacings = " + header.get("spacings").substr(0, 60));
        if (in_space > 0) header.damaged("it has spacings, and a space whose directions have them too");
        const auto values = header.numbers("spacings", spacings, spacings.size());
        for (int i = 0; i < axes; ++i) grid.spacing[i] = values[i];
    }
    if (header.has("axismins") || header.has("axismaxs")) {
        throw ImageError(path + " says where it is by axis mins, which this engine does not read; convert it first");
    }
    if (in_space > 0 && in_space != axes) {
        throw ImageError(path + " has " + std::to_string(axes) + " axes in a space of " + std::to_string(in_space) +
                         ", expected as many; convert it first");
    }
    if (header.has("spacedirections")) {
        const auto vectors = vectors_of(header, header.get("spacedirections"));
        const bool fits = static_cast<int>(vectors.size()) == axes &&
                          std::all_of(vectors.begin(), vectors.end(), [&](const auto& vector) {
                              return vector.empty() || static_cast<std::int64_t>(vector.size()) == in_space;
                          });
        if (!fits) header.damaged("space directions = " + header.get("spacedirections").substr(0, 60));
        for (int i = 0; i < axes; ++i) {
            if (vectors[i].empty()) continue;
            double squares = 0;
            for (const double value : vectors[i]) squares += value * value;
            const double length = std::sqrt(squares);
            grid.spacing[i] = length;
            for (int j = 0; j < axes; ++j) grid.cosine(j, i) = vectors[i][j] * (1.0 / length) * sign[j];
        }
    }
    if (header.has("spaceorigin")) {
        const auto vectors = vectors_of(header, header.get("spaceorigin"));
        if (vectors.size() != 1 || static_cast<std::int64_t>(vectors[0].size()) != in_space) {
            header.damaged("space origin = " + header.get("spaceorigin").substr(0, 60));
        }
        for (int j = 0; j < axes; ++j) grid.origin[j] = vectors[0][j] * sign[j];
    }
    settle(grid, path);
    return grid;
}

// Axes that are none of space hold several values of a voxel.
void check_kinds(const TextHeader& header, const std::vector<std::int64_t>& sizes) {
    const auto kinds = words_of(lowered(header.get("kinds")));
    if (kinds.size() != sizes.size()) {
        if (header.has("kinds")) header.damaged("kinds = " + header.get("kinds").substr(0, 60));
        return;
    }
    for (std::size_t i = 0; i < kinds.size(); ++i) {
        const std::string& kind = kinds[i];
        if (kind == "domain" || kind == "space" || kind == "time" || kind == "???" || kind == "none") continue;
        throw ImageError(header.path() + " has " + std::to_string(sizes[i]) + " value(s) per voxel (" + utf8(kind) +
                         "), expected one real number; make a file of each channel");
    }
}

}  // namespace

bool is_nrrd(const std::string& path) {
    const std::string lower = lowered(path);
    return ends_with(lower, ".nrrd") || ends_with(lower, ".nhdr");
}

ItkFile read_nrrd(const std::string& path) {
    TextHeader header(path);
    parse(header);
    const std::int64_t axes = header.whole("dimension", header.get("dimension"));
    if (axes < 1 || axes > 16) header.damaged("dimension: " + std::to_string(axes));
    const auto sizes = header.sizes("sizes", header.get("sizes"), axes);
    const std::string type = lowered(header.get("type")), encoding = lowered(header.get("encoding"));
    const auto kind = kTypes.find(type);
    if (kind == kTypes.end()) header.damaged("type: " + type);
    Place place;
    if (encoding == "gzip" || encoding == "gz") {
        place.packing = Packing::gzip;
    } else if (encoding != "raw") {
        throw ImageError(path + " has the encoding '" + utf8(encoding) + "', expected raw or gzip; convert it first");
    }
    const std::string endian = lowered(header.get("endian"));
    if (bytes_of(kind->second) > 1 && endian != "little" && endian != "big") header.damaged("endian: " + endian);
    Layout layout;
    layout.kind = kind->second;
    layout.big_endian = endian == "big";
    if (header.whole("lineskip", header.get("lineskip", "0")) != 0) {
        throw ImageError(
            path + ": lines are to be skipped before its voxels, which this engine does not do; convert it first");
    }
    place.skip = header.whole("byteskip", header.get("byteskip", "0"));
    const std::string data = header.get("datafile", "LOCAL");
    place.data_file = data == "LOCAL" ? "" : data;
    check_one_file(path, data);
    check_kinds(header, sizes);
    check_axes(path, axes);
    ItkFile out;
    out.grid = grid_of(header, static_cast<int>(axes));
    out.volume = read_placed(header, place, sizes, layout);
    return out;
}

void write_nrrd(const std::string& path, const Grid& grid, const std::vector<std::int64_t>& sizes_xyz,
                const SmallestLabels& labels) {
    const int axes = grid.axes;
    const auto vector = [&](const auto& value) {
        std::string text;
        for (int i = 0; i < axes; ++i) text += (i == 0 ? "(" : ",") + exact(value(i));
        return text + ")";
    };
    std::string sizes, directions, kinds;
    for (int axis = 0; axis < axes; ++axis) {
        sizes += " " + std::to_string(sizes_xyz[axis]);
        directions += " " + vector([&](int i) { return grid.spacing[axis] * grid.cosine(i, axis); });
        kinds += " domain";
    }
    const bool is_wide = labels.get().bytes == 2;
    const std::string voxels = beside(path, ".raw.gz");
    const bool is_local = !ends_with(lowered(path), ".nhdr");
    const std::string header =
        "NRRD0004\n# Complete NRRD file format specification at:\n# "
        "http://teem.sourceforge.net/nrrd/format.html\ntype: " +
        std::string(is_wide ? "unsigned short" : "unsigned char") + "\ndimension: " + std::to_string(axes) +
        (axes == 3 ? "\nspace: left-posterior-superior" : "\nspace dimension: " + std::to_string(axes)) +
        "\nsizes:" + sizes + "\nspace directions:" + directions + "\nkinds:" + kinds +
        (is_wide ? "\nendian: little" : "") +
        "\nencoding: gzip\nspace origin: " + vector([&](int i) { return grid.origin[i]; }) + "\n" +
        (is_local ? "" : "data file: " + name_of(voxels)) + "\n";
    const auto packed = labels.bytes_after({}, Packing::gzip);
    std::vector<std::uint8_t> content(header.begin(), header.end());
    if (is_local) {
        content.insert(content.end(), packed.begin(), packed.end());
    } else {
        write_file(voxels, packed);  // what is asked for comes last
    }
    write_file(path, content);
}

}  // namespace fastnnunet::images
