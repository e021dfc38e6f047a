#include "core/window.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastnnunet {
namespace {

std::string text_of(const Sizes& sizes) {
    std::ostringstream text;
    for (std::size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "(" : ", ") << sizes[i];
    text << (sizes.size() == 1 ? ",)" : ")");
    return text.str();
}

void require_fit(const Sizes& image, const Sizes& tile) {
    bool fits = image.size() == tile.size();
    for (std::size_t axis = 0; fits && axis < image.size(); ++axis) fits = 0 < tile[axis] && tile[axis] <= image[axis];
    if (!fits) {
        throw std::invalid_argument("tile " + text_of(tile) + " does not fit into image " + text_of(image) +
                                    "; pad the image first");
    }
}

void require_step(double step_size) {
    if (step_size > 0 && step_size <= 1) return;
    std::ostringstream text;
    text << "step_size: got " << step_size << ", expected a number in (0, 1]";
    throw std::invalid_argument(text.str());
}

Sizes starts_along(std::int64_t image, std::int64_t tile, double step_size) {
    const double room = static_cast<double>(image - tile);
    const auto steps = static_cast<std::int64_t>(std::ceil(room / (static_cast<double>(tile) * step_size)));
    const double step = steps > 0 ? room / static_cast<double>(steps) : 0.0;
    Sizes starts(steps + 1);
    // half to even, as NumPy rounds
    for (std::int64_t i = 0; i <= steps; ++i) starts[i] = std::llrint(step * static_cast<double>(i));
    return starts;
}

// body(z, y, x) for all numbers below `count`, in C order
template <class Body>
void for_each_index(const Index& count, const Body& body) {
    for (std::int64_t z = 0; z < count[0]; ++z) {
        for (std::int64_t y = 0; y < count[1]; ++y) {
            for (std::int64_t x = 0; x < count[2]; ++x) body(z, y, x);
        }
    }
}

std::int64_t number_of(const Index& at, const Index& count) { return (at[0] * count[1] + at[1]) * count[2] + at[2]; }

Index lengths(const ChunkedWindow::PerAxis& axes, std::int64_t less) {
    const auto length = [&](int axis) { return static_cast<std::int64_t>(axes[axis].size()) - less; };
    return {length(0), length(1), length(2)};
}

}  // namespace

Padding centre_padding(std::int64_t size, std::int64_t least) {
    const std::int64_t missing = std::max<std::int64_t>(0, least - size);
    return {missing / 2, missing - missing / 2};
}

std::vector<Sizes> tile_starts(const Sizes& image, const Sizes& tile, double step_size) {
    require_step(step_size);
    require_fit(image, tile);
    std::vector<Sizes> starts;
    for (std::size_t axis = 0; axis < image.size(); ++axis) {
        starts.push_back(starts_along(image[axis], tile[axis], step_size));
    }
    return starts;
}

ChunkedWindow::ChunkedWindow(const Index& shape, const Sizes& patch, double step_size) : shape_(shape) {
    if (patch.size() != 2 && patch.size() != 3) {
        throw std::invalid_argument("a patch has two or three axes, got " + text_of(patch));
    }
    const int first = static_cast<int>(3 - patch.size());  // the first axis of the patch
    tile_[0] = 1;
    std::copy(patch.begin(), patch.end(), tile_.begin() + first);
    Sizes padded;
    for (int axis = first; axis < 3; ++axis) padded.push_back(std::max(shape[axis], tile_[axis]));
    const std::vector<Sizes> starts = tile_starts(padded, patch, step_size);
    for (std::int64_t z = 0; first == 1 && z < shape[0]; ++z) starts_[0].push_back(z);
    for (int axis = first; axis < 3; ++axis) {
        starts_[axis] = starts[axis - first];
        for (std::int64_t& start : starts_[axis]) start -= centre_padding(shape[axis], tile_[axis]).below;
    }
}

void ChunkedWindow::bound(PerAxis bounds) {
    bounds_ = std::move(bounds);
    for (int axis = 0; axis < 3; ++axis) {
        const Sizes& at = bounds_[axis];
        for (const std::int64_t start : starts_[axis]) {
            const std::int64_t lower = std::max<std::int64_t>(0, start);
            const std::int64_t upper = std::min(at.back(), start + tile_[axis]);
            reach_[axis].push_back({std::upper_bound(at.begin(), at.end(), lower) - at.begin() - 1,
                                    std::lower_bound(at.begin(), at.end(), upper) - at.begin()});
        }
    }
}

ChunkedWindow ChunkedWindow::of_chunks(const Index& shape, const Sizes& patch, double step_size, const Index& chunk) {
    ChunkedWindow window(shape, patch, step_size);
    PerAxis bounds;
    for (int axis = 0; axis < 3; ++axis) {
        if (chunk[axis] < 1) throw std::invalid_argument("a chunk needs at least one voxel along each axis");
        for (std::int64_t at = 0; at < shape[axis]; at += chunk[axis]) bounds[axis].push_back(at);
        bounds[axis].push_back(shape[axis]);
    }
    window.bound(std::move(bounds));
    return window;
}

ChunkedWindow ChunkedWindow::streamed(const Index& shape, const Sizes& patch, double step_size) {
    ChunkedWindow window(shape, patch, step_size);
    PerAxis bounds;
    for (int axis = 0; axis < 2; ++axis) {
        Sizes& at = bounds[axis];
        at = {0, shape[axis]};
        for (const std::int64_t start : window.starts_[axis]) {
            for (const std::int64_t edge : {start, start + window.tile_[axis]}) {
                if (0 < edge && edge < shape[axis]) at.push_back(edge);
            }
        }
        std::sort(at.begin(), at.end());
        at.erase(std::unique(at.begin(), at.end()), at.end());
    }
    bounds[2] = {0, shape[2]};
    window.bound(std::move(bounds));
    return window;
}

std::int64_t ChunkedWindow::tiles() const {
    const Index count = lengths(starts_, 0);
    return count[0] * count[1] * count[2];
}

Index ChunkedWindow::position(std::int64_t tile) const {
    if (tile < 0 || tile >= tiles()) throw std::out_of_range("there is no tile " + std::to_string(tile));
    const Index count = lengths(starts_, 0);
    return {tile / (count[1] * count[2]), tile / count[2] % count[1], tile % count[2]};
}

Index ChunkedWindow::tile_start(std::int64_t number) const {
    const auto [z, y, x] = position(number);
    return {starts_[0][z], starts_[1][y], starts_[2][x]};
}

Index ChunkedWindow::grid() const { return lengths(bounds_, 1); }

Box ChunkedWindow::chunk(const Index& number) const {
    Box box{};
    for (int axis = 0; axis < 3; ++axis) {
        box.start[axis] = bounds_[axis].at(number[axis]);
        box.stop[axis] = bounds_[axis].at(number[axis] + 1);
    }
    return box;
}

ChunkedWindow::Overlap ChunkedWindow::overlap(std::int64_t tile, const Index& chunk) const {
    const Index first = tile_start(tile);
    const Box voxels = this->chunk(chunk);
    Overlap shared{};
    for (int axis = 0; axis < 3; ++axis) {
        const std::int64_t lower = std::max(first[axis], voxels.start[axis]);
        const std::int64_t upper = std::min(first[axis] + tile_[axis], voxels.stop[axis]);
        shared.in_chunk.start[axis] = lower - voxels.start[axis];
        shared.in_chunk.stop[axis] = upper - voxels.start[axis];
        shared.in_tile.start[axis] = lower - first[axis];
        shared.in_tile.stop[axis] = upper - first[axis];
    }
    return shared;
}

std::vector<Index> ChunkedWindow::chunks_of(std::int64_t tile) const {
    const Index at = position(tile);
    const Range z = reach_[0][at[0]], y = reach_[1][at[1]], x = reach_[2][at[2]];
    std::vector<Index> touched;
    for_each_index({z.stop - z.start, y.stop - y.start, x.stop - x.start},
                   [&](std::int64_t dz, std::int64_t dy, std::int64_t dx) {
                       touched.push_back({z.start + dz, y.start + dy, x.start + dx});
                   });
    return touched;
}

std::vector<std::int32_t> ChunkedWindow::tiles_per_chunk() const {
    const Index count = grid();
    std::array<std::vector<std::int32_t>, 3> along;
    for (int axis = 0; axis < 3; ++axis) {
        along[axis].assign(count[axis], 0);
        for (const Range& reach : reach_[axis]) {
            for (std::int64_t chunk = reach.start; chunk < reach.stop; ++chunk) ++along[axis][chunk];
        }
    }
    std::vector<std::int32_t> tiles;
    for_each_index(count, [&](std::int64_t z, std::int64_t y, std::int64_t x) {
        tiles.push_back(along[0][z] * along[1][y] * along[2][x]);
    });
    return tiles;
}

std::int64_t ChunkedWindow::peak_voxels(std::int64_t margin) const {
    const Index positions = lengths(starts_, 0);
    std::array<Sizes, 3> first, last;  // per axis and chunk: the first and the last tile position that touches it
    for (int axis = 0; axis < 3; ++axis) {
        first[axis].assign(bounds_[axis].size() - 1, positions[axis]);
        last[axis].assign(bounds_[axis].size() - 1, 0);
        for (std::int64_t at = 0; at < positions[axis]; ++at) {
            for (std::int64_t chunk = reach_[axis][at].start; chunk < reach_[axis][at].stop; ++chunk) {
                first[axis][chunk] = std::min(first[axis][chunk], at);
                last[axis][chunk] = at;
            }
        }
    }
    Sizes begun(tiles(), 0), done(tiles(), 0);  // voxels, by tile
    for_each_index(grid(), [&](std::int64_t z, std::int64_t y, std::int64_t x) {
        const Box box = chunk({z, y, x});
        const std::int64_t voxels = (box.stop[0] - box.start[0] + margin) * (box.stop[1] - box.start[1] + margin) *
                                    (box.stop[2] - box.start[2]);
        begun[number_of({first[0][z], first[1][y], first[2][x]}, positions)] += voxels;
        done[number_of({last[0][z], last[1][y], last[2][x]}, positions)] += voxels;
    });
    std::int64_t waiting = 0, most = 0;
    for (std::size_t tile = 0; tile < begun.size(); ++tile) {
        waiting += begun[tile];
        most = std::max(most, waiting);  // while a tile is added, what it completes is still there
        waiting -= done[tile];
    }
    return most;
}

}  // namespace fastnnunet
