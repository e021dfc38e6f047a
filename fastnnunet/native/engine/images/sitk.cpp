// nnU-Net's SimpleITKIO and SimpleITKIOWithReorient, without ITK.

#include <algorithm>
#include <cmath>

#include "grid.hpp"
#include "itk_files.hpp"
#include "reader.hpp"
#include "text.hpp"

namespace fastnnunet::images {
namespace {

const Orientation kRas{{0, 1, 2}, {true, true, false}};

std::string floats_text(const double* values, int count) {
    return "(" + joined(std::vector<double>(values, values + count), repr) + (count == 1 ? ",)" : ")");
}

// ITK's grid of the image after it was turned, and how it lay before
class GridHeader final : public Header {
public:
    GridHeader(const Grid& grid, bool turned, const Orientation& original)
        : grid_(grid), turned_(turned), original_(original) {}

    void write(const std::string& path, const Labels& labels) const override {
        const SmallestLabels smallest(labels);
        const Labels& small = smallest.get();
        std::array<std::int64_t, 3> sizes{small.shape_ZYX[2], small.shape_ZYX[1], small.shape_ZYX[0]};
        Grid grid = grid_;
        if (grid.axes == 4) grid = spatial(grid);  // a file of channels has a label map without them
        if (grid.axes == 2 && sizes[2] != 1) {
            throw ImageError("cannot write " + path + ": the label map has " + std::to_string(sizes[2]) +
                             " slices, expected one");
        }
        const Turn turn = turned_ ? turn_between(kRas, original_) : Turn{};
        if (turn.is_none()) {
            write_itk(path, grid, {sizes.begin(), sizes.begin() + grid.axes}, smallest);
            return;
        }
        std::vector<std::uint16_t> voxels(static_cast<std::size_t>(small.size()));  // of either size
        turn_voxels(small.voxels_ZYX, sizes, small.bytes, turn, voxels.data());
        grid = images::turned(grid, turn, sizes);
        sizes = turned_sizes(sizes, turn);
        const std::array<std::int64_t, 3> shape{sizes[2], sizes[1], sizes[0]};
        const bool is_narrow = small.bytes == 1;
        const Labels back = is_narrow ? Labels(reinterpret_cast<const std::uint8_t*>(voxels.data()), shape)
                                      : Labels(voxels.data(), shape);
        write_itk(path, grid, {sizes.begin(), sizes.end()}, SmallestLabels(back));
    }

    Affine affine() const override {
        Affine affine = identity<4>();
        const int axes = std::min(3, grid_.axes);  // of four, the last is the channel
        for (int i = 0; i < axes; ++i) {
            for (int j = 0; j < axes; ++j) affine[i][j] = grid_.cosine(i, j) * grid_.spacing[j];
            affine[i][3] = grid_.origin[i];
        }
        return affine;
    }

private:
    static Grid spatial(const Grid& whole) {
        Grid grid = plain_grid(3);
        for (int row = 0; row < 3; ++row) {
            grid.spacing[row] = whole.spacing[row];
            grid.origin[row] = whole.origin[row];
            for (int column = 0; column < 3; ++column) grid.cosine(row, column) = whole.cosine(row, column);
        }
        return grid;
    }

    Grid grid_;
    bool turned_;
    Orientation original_;
};

void turn_to_ras(const std::string& path, ItkFile& file, Orientation* original) {
    if (file.grid.axes != 3) {
        throw ImageError("cannot turn " + path + " to RAS: it has " + std::to_string(file.grid.axes) +
                         " dimensions, expected three");
    }
    *original = orientation_of(file.grid);
    const Turn turn = turn_between(*original, kRas);
    if (turn.is_none()) return;
    const std::array<std::int64_t, 3> sizes{file.volume.sizes_xyz[0], file.volume.sizes_xyz[1],
                                            file.volume.sizes_xyz[2]};
    auto voxels = new_floats(path, file.volume.size());
    turn_voxels(file.volume.voxels.get(), sizes, sizeof(float), turn, voxels.get());
    file.volume.voxels = std::move(voxels);
    file.grid = turned(file.grid, turn, sizes);
    const auto after = turned_sizes(sizes, turn);
    file.volume.sizes_xyz.assign(after.begin(), after.end());
}

Channel read_one(const std::string& path, bool reorient, const ReadOptions& options) {
    ItkFile file = read_itk(path, options);
    const int axes = file.grid.axes;
    if (axes < 2 || axes > 4) {
        throw ImageError(path + " has " + std::to_string(axes) + " dimensions, expected a scalar image of 2 or 3 "
                         "dimensions, or 4 where the last is the channel");
    }
    Orientation original;
    if (reorient) turn_to_ras(path, file, &original);
    const Grid& grid = file.grid;
    Channel channel;
    channel.has_channels = axes == 4;
    channel.warnings = std::move(file.warnings);
    const double* spacing = grid.spacing.data();
    // a picture gets a slice distance that never invites resampling
    const double through = axes == 2 ? std::max(spacing[0], spacing[1]) * 999 : spacing[2];
    channel.spacing_ZYX = {through, spacing[1], spacing[0]};
    const auto share = [&](const char* name, const double* values, int count) {
        channel.shared.push_back({name, {values, values + count}, floats_text(values, count)});
    };
    share("spacing", spacing, axes);
    share("origin", grid.origin.data(), axes);
    share("direction", grid.direction.data(), axes * axes);
    channel.header = std::make_shared<GridHeader>(grid, reorient, original);
    channel.volume = std::move(file.volume);
    return channel;
}

}  // namespace

Reader sitk_reader(bool reorient) {
    return [reorient](const std::vector<std::string>& paths, const ReadOptions& options, bool) {
        return read_channels(paths, options.threads,
                             [&](const std::string& path) { return read_one(path, reorient, options); });
    };
}

}  // namespace fastnnunet::images
