// nnU-Net's NibabelIO and NibabelIOWithReorient: NIfTI files of either version with the affine that nibabel finds in
// them.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dicom/series.hpp"
#include "grid.hpp"
#include "image.hpp"
#include "linear.hpp"
#include "nifti.hpp"
#include "reader.hpp"
#include "text.hpp"

namespace fastnnunet::images {
namespace {

[[noreturn]] void cannot_read(const std::string& path, const std::string& why) {
    throw ImageError("cannot read " + path + ": " + why + "\nexpected a NIfTI image");
}

// What nibabel mends when it opens a file, and what it refuses
NiftiHeader mended(NiftiHeader header, const std::string& path) {
    const int at_least = header.version == 1 ? 352 : 544;
    if (header.start < at_least) {
        cannot_read(path, "vox offset " + std::to_string(header.start) + " too low for single file nifti" +
                              std::to_string(header.version));
    }
    for (int i = 1; i <= 3; ++i) header.pixdim[i] = header.pixdim[i] == 0 ? 1 : std::fabs(header.pixdim[i]);
    if (header.pixdim[0] != 1 && header.pixdim[0] != -1) header.pixdim[0] = 1;
    for (int* code : {&header.qform_code, &header.sform_code}) {
        if (*code < 0 || *code > 5) *code = 0;
    }
    return header;
}

Affine affine_of_qform(const NiftiHeader& header, const std::string& path) {
    using Real = long double;
    const Real x = header.qform[0], y = header.qform[1], z = header.qform[2];
    const Real squared = 1 - (x * x + y * y + z * z);
    const Real threshold = 3 * 1.1920928955078125e-07L;
    if (!(std::fabs(squared) < threshold) && squared < 0) {
        char text[80];
        std::snprintf(text, sizeof text, "w2 should be positive, but is %Le", squared);
        cannot_read(path, text);
    }
    const Real w = std::fabs(squared) < threshold ? 0 : std::sqrt(squared);
    const Real s = 2 / (w * w + x * x + y * y + z * z);
    const Real X = x * s, Y = y * s, Z = z * s;
    const Real r[3][3] = {
        {1 - (y * Y + z * Z), x * Y - w * Z, x * Z + w * Y},
        {x * Y + w * Z, 1 - (x * X + z * Z), y * Z - w * X},
        {x * Z - w * Y, y * Z + w * X, 1 - (x * X + y * Y)},
    };
    Affine affine = identity<4>();
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
            const Real length = static_cast<Real>(header.pixdim[j + 1]) * (j == 2 ? header.pixdim[0] : 1);
            affine[i][j] = static_cast<double>(r[i][j] * length);
        }
        affine[i][3] = header.qform[3 + i];
    }
    return affine;
}

Affine affine_of(const NiftiHeader& header, const std::string& path) {
    Affine affine = identity<4>();
    if (header.sform_code != 0) {
        for (int i = 0; i < 12; ++i) affine[i / 4][i % 4] = header.sform[i];
    } else if (header.qform_code != 0) {
        affine = affine_of_qform(header, path);
    } else {  // centred, and from right to left
        for (int i = 0; i < 3; ++i) {
            const double spacing = header.pixdim[i + 1] * (i == 0 ? -1 : 1);
            affine[i][i] = spacing;
            affine[i][3] = -(static_cast<double>(header.sizes_xyz[i]) - 1) / 2 * spacing;
        }
    }
    return affine;
}

Matrix3 top(const Affine& affine) {
    Matrix3 out;
    for (int i = 0; i < 3; ++i) std::copy(affine[i].begin(), affine[i].begin() + 3, out[i].begin());
    return out;
}

double column_length(const Affine& affine, int column) {
    const double x = affine[0][column], y = affine[1][column], z = affine[2][column];
    return std::sqrt(x * x + y * y + z * z);
}

// nibabel's io_orientation: for each axis of the image the axis of RAS it is nearest to, the clearest first
Orientation nearest_axes(const Affine& affine) {
    Matrix3 scaled = top(affine);
    for (int j = 0; j < 3; ++j) {
        const double length = column_length(affine, j);
        for (int i = 0; i < 3; ++i) scaled[i][j] /= length == 0 ? 1 : length;
    }
    Matrix3 r = Svd<3>(scaled).polar();
    std::array<int, 3> order{0, 1, 2};
    std::array<double, 3> clearest{};
    for (int j = 0; j < 3; ++j) {
        for (int i = 0; i < 3; ++i) clearest[j] = std::max(clearest[j], r[i][j] * r[i][j]);
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return clearest[a] > clearest[b]; });
    Orientation out;
    for (const int column : order) {
        int row = 0;
        for (int i = 1; i < 3; ++i) {
            if (std::fabs(r[i][column]) > std::fabs(r[row][column])) row = i;
        }
        out.axis[column] = row;
        out.against[column] = r[row][column] < 0;
        r[row] = {0, 0, 0};
    }
    return out;
}

// The affine of the image whose axes were turned
Affine turned_affine(const Affine& affine, const Turn& turn, const std::array<std::int64_t, 3>& sizes_xyz) {
    Affine back{};
    back[3][3] = 1;
    for (int i = 0; i < 3; ++i) {
        const int j = turn.from[i];
        back[j][i] = turn.flipped[i] ? -1 : 1;
        if (turn.flipped[i]) back[j][3] = static_cast<double>(sizes_xyz[j] - 1);
    }
    return multiplied<4>(affine, back);
}

// The header that nibabel writes for an affine of its own
std::vector<std::uint8_t> header_of(const Affine& affine, const std::array<std::int64_t, 3>& sizes_xyz,
                                    int voxel_bytes) {
    std::vector<std::uint8_t> header(352, 0);
    const auto integer = [&](std::size_t at, std::int64_t value, int size) {
        for (int i = 0; i < size; ++i) header[at + i] = static_cast<std::uint8_t>(value >> (8 * i));
    };
    const auto number = [&](std::size_t at, double value) {
        const auto narrow = static_cast<float>(value);
        std::uint32_t bits;
        std::memcpy(&bits, &narrow, sizeof bits);
        integer(at, bits, 4);
    };
    Matrix3 r = top(affine);
    std::array<double, 3> lengths;
    for (int j = 0; j < 3; ++j) {
        lengths[j] = column_length(affine, j);
        for (int i = 0; i < 3; ++i) r[i][j] /= lengths[j];
    }
    const bool is_mirrored = !(determinant<3>(r) > 0);
    for (int i = 0; i < 3 && is_mirrored; ++i) r[i][2] = -r[i][2];
    const auto q = quaternion_of(Svd<3>(r).polar());
    integer(0, 348, 4);
    integer(40, 3, 2);
    for (int i = 0; i < 7; ++i) integer(42 + 2 * i, i < 3 ? sizes_xyz[i] : 1, 2);
    integer(70, voxel_bytes == 1 ? 2 : 512, 2);
    integer(72, 8 * voxel_bytes, 2);
    number(76, is_mirrored ? -1 : 1);
    for (int i = 0; i < 7; ++i) number(80 + 4 * i, i < 3 ? lengths[i] : 1);
    number(108, 352);
    number(112, 1);    // the slope of values
    integer(254, 2, 2);  // the sform is aligned with something, the qform unused
    for (int i = 0; i < 3; ++i) {
        number(256 + 4 * i, q[i + 1]);
        number(268 + 4 * i, affine[i][3]);
        for (int j = 0; j < 4; ++j) number(280 + 16 * i + 4 * j, affine[i][j]);
    }
    integer(344, 'n', 1);
    integer(345, '+', 1);
    integer(346, '1', 1);
    return header;
}

class AffineHeader final : public Header {
public:
    AffineHeader(const Affine& original, const Affine& reoriented, bool reorient)
        : original_(original), reoriented_(reoriented), reorient_(reorient) {}

    void write(const std::string& path, const Labels& labels) const override {
        const SmallestLabels smallest(labels);
        const Labels& small = smallest.get();
        const std::array<std::int64_t, 3> sizes{small.shape_ZYX[2], small.shape_ZYX[1], small.shape_ZYX[0]};
        const Orientation ras{{0, 1, 2}, {false, false, false}};
        const Turn turn = reorient_ ? turn_between(ras, nearest_axes(original_)) : Turn{};
        if (turn.is_none()) {
            write_nifti(path, reorient_ ? reoriented_ : original_, sizes, smallest);
            return;
        }
        std::vector<std::uint16_t> voxels(static_cast<std::size_t>(small.size()));  // of either size
        turn_voxels(small.voxels_ZYX, sizes, small.bytes, turn, voxels.data());
        const auto after = turned_sizes(sizes, turn);
        const std::array<std::int64_t, 3> shape{after[2], after[1], after[0]};
        const Labels back = small.bytes == 1 ? Labels(reinterpret_cast<const std::uint8_t*>(voxels.data()), shape)
                                             : Labels(voxels.data(), shape);
        write_nifti(path, turned_affine(reoriented_, turn, sizes), after, SmallestLabels(back));
    }

    Affine affine() const override {
        Affine affine = reorient_ ? reoriented_ : original_;
        for (int i = 0; i < 2; ++i) {
            for (double& value : affine[i]) value = -value;  // NIfTI's axes point right and front
        }
        return affine;
    }

private:
    static void write_nifti(const std::string& path, const Affine& affine, const std::array<std::int64_t, 3>& sizes_xyz,
                            const SmallestLabels& labels) {
        if (*std::max_element(sizes_xyz.begin(), sizes_xyz.end()) > 32767) {
            throw ImageError("cannot write " + path +
                             ": an axis is longer than 32767 voxels, which NIfTI has no room for");
        }
        if (!is_nifti(path)) throw ImageError("cannot write " + path + ": expected a name ending in .nii or .nii.gz");
        const auto header = header_of(affine, sizes_xyz, labels.get().bytes);
        const Packing packing = ends_with(lowered(path), ".gz") ? Packing::gzip : Packing::none;
        write_file(path, labels.bytes_after(header, packing));
    }

    Affine original_, reoriented_;
    bool reorient_;
};

std::string affine_text(const Affine& affine) {
    std::string text;
    for (const auto& row : affine) text += (text.empty() ? "[" : ", [") + joined(row, repr) + "]";
    return "[" + text + "]";
}

void check(const NiftiFile& file, const NiftiHeader& header) {
    const std::string& path = file.path();
    const bool says_packed = ends_with(lowered(path), ".gz");
    if (says_packed && !file.packed()) cannot_read(path, "File " + path + " is not a gzip file");
    if (!says_packed && file.packed()) cannot_read(path, "it is compressed but not named so (.nii.gz)");
    if (header.axes() != 3) {
        throw ImageError(path + " has shape " + tuple_text(header.sizes_xyz) + ", expected three dimensions (x, y, z)");
    }
}

void check(const Affine& affine, const std::string& path) {
    bool is_finite = true;
    for (const auto& row : affine) {
        for (const double value : row) is_finite = is_finite && std::isfinite(value);
    }
    if (is_finite && determinant<3>(top(affine)) != 0) return;
    throw ImageError(path + " has a damaged header: its affine is " + affine_text(affine) + "; export it again");
}

// An image whose axes are still those of the file
struct Loaded {
    Volume volume;
    Affine affine;
    std::array<double, 3> spacing;
    bool is_single_precision = true;  // how a spacing is kept
    std::vector<std::string> warnings;
};

// The same voxels and place; ITK's axes point left and back (LPS) where NIfTI's point right and front (RAS).
Loaded load_series(const std::string& folder, const ReadOptions& options) {
    Loaded out;
    ItkFile file = read_series(folder, options.series_uid, &out.warnings);
    out.affine = identity<4>();
    for (int i = 0; i < 3; ++i) {
        const double sign = i < 2 ? -1 : 1;
        for (int j = 0; j < 3; ++j) out.affine[i][j] = sign * (file.grid.cosine(i, j) * file.grid.spacing[j]);
        out.affine[i][3] = sign * file.grid.origin[i];
    }
    for (int j = 0; j < 3; ++j) out.spacing[j] = static_cast<float>(column_length(out.affine, j));
    out.volume = std::move(file.volume);
    return out;
}

Loaded load_nifti(const std::string& path) {
    File exists(path);  // says that it is missing before it says what it should be
    if (!is_nifti(path)) {
        throw ImageError(path + ": this model reads NIfTI files (.nii, .nii.gz); convert the image first");
    }
    NiftiFile file(path);
    const NiftiHeader header = mended(file.header(), path);
    Rescale rescale;
    rescale.slope = header.slope;
    rescale.intercept = header.intercept;
    rescale.on = std::isfinite(header.slope) && header.slope != 0 && (header.slope != 1 || header.intercept != 0);
    Loaded out;
    out.volume = file.read(rescale);
    check(file, header);
    out.affine = affine_of(header, path);
    check(out.affine, path);
    out.spacing = {header.pixdim[1], header.pixdim[2], header.pixdim[3]};
    out.is_single_precision = header.version == 1;
    return out;
}

Channel read_one(const std::string& path, bool reorient, const ReadOptions& options) {
    Loaded loaded = is_folder(path) ? load_series(path, options) : load_nifti(path);
    const Affine& affine = loaded.affine;
    std::array<double, 3>& spacing = loaded.spacing;
    Channel channel;
    channel.volume = std::move(loaded.volume);
    channel.warnings = std::move(loaded.warnings);
    Affine reoriented = affine;
    const Turn turn = reorient ? turn_between(nearest_axes(affine), {{0, 1, 2}, {false, false, false}}) : Turn{};
    if (!turn.is_none()) {
        auto& sizes = channel.volume.sizes_xyz;
        const std::array<std::int64_t, 3> before{sizes[0], sizes[1], sizes[2]}, after = turned_sizes(before, turn);
        auto voxels = new_floats(path, channel.volume.size());
        turn_voxels(channel.volume.voxels.get(), before, sizeof(float), turn, voxels.get());
        channel.volume.voxels = std::move(voxels);
        sizes.assign(after.begin(), after.end());
        reoriented = turned_affine(affine, turn, before);
        for (int i = 0; i < 3; ++i) {
            const double length = column_length(reoriented, i);
            spacing[i] = loaded.is_single_precision ? static_cast<float>(length) : length;
        }
    }
    channel.spacing_ZYX = {spacing[2], spacing[1], spacing[0]};
    channel.shared.push_back(
        {"spacing", {spacing[2], spacing[1], spacing[0]}, "[" + joined(channel.spacing_ZYX, repr) + "]"});
    std::vector<double> values;
    for (const auto& row : reoriented) values.insert(values.end(), row.begin(), row.end());
    channel.shared.push_back({"affine", values, affine_text(reoriented)});
    channel.header = std::make_shared<AffineHeader>(affine, reoriented, reorient);
    return channel;
}

}  // namespace

Reader nibabel_reader(bool reorient) {
    return [reorient](const std::vector<std::string>& paths, const ReadOptions& options, bool) {
        return read_channels(paths, options.threads,
                             [&](const std::string& path) { return read_one(path, reorient, options); });
    };
}

}  // namespace fastnnunet::images
