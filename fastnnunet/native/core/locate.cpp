#include "core/locate.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "core/half.hpp"
#include "core/simd.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

FASTNNUNET_CLONES
void add_row(const float* values, double* sums, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(values[i]);
}

}  // namespace

Index coarse_shape(const Index& shape, const Index& factor) {
    Index blocks{};
    for (int axis = 0; axis < 3; ++axis) blocks[axis] = (shape[axis] + factor[axis] - 1) / factor[axis];
    return blocks;
}

void block_means(const Volumes<const float>& image, const Index& factor, const Volumes<float>& means, int threads) {
    if (*std::min_element(factor.begin(), factor.end()) < 1 || means.count != image.count ||
        means.shape != coarse_shape(image.shape, factor)) {
        throw std::invalid_argument("block means: the means are not of the blocks of this image");
    }
    const auto [depth, height, width] = image.shape;
    const std::int64_t rows = means.shape[0] * means.shape[1];
    parallel_for<std::vector<double>>(
        means.count * rows, threads,
        [&, depth = depth, height = height, width = width](std::int64_t number, std::vector<double>& sums) {
        const Volume<const float> from = image[number / rows];
        const Volume<float> to = means[number / rows];
        const std::int64_t row = number % rows;
        const std::int64_t z = row / to.shape[1] * factor[0], y = row % to.shape[1] * factor[1];
        const std::int64_t z_stop = std::min(z + factor[0], depth), y_stop = std::min(y + factor[1], height);
        sums.assign(static_cast<std::size_t>(width), 0.0);
        for (std::int64_t plane = z; plane < z_stop; ++plane) {
            for (std::int64_t line = y; line < y_stop; ++line) add_row(from.row(plane, line), sums.data(), width);
        }
        float* out = to.row(row);
        for (std::int64_t x = 0; x < width; x += factor[2]) {
            const std::int64_t x_stop = std::min(x + factor[2], width);
            double sum = 0;
            for (std::int64_t i = x; i < x_stop; ++i) sum += sums[static_cast<std::size_t>(i)];
            const std::int64_t count = (z_stop - z) * (y_stop - y) * (x_stop - x);
            out[x / factor[2]] = static_cast<float>(sum / static_cast<double>(count));
        }
    });
}

std::optional<Box> seen_box(const Volumes<const Half>& logits, double threshold, const Index& factor,
                            const Index& shape) {
    if (logits.count != 2 || logits.shape != coarse_shape(shape, factor)) {
        throw std::invalid_argument("seen box: the logits are not two of each block of this image");
    }
    const auto odds = static_cast<float>(std::log(threshold / (1 - threshold)));
    Box box{shape, {0, 0, 0}};
    for (std::int64_t z = 0; z < logits.shape[0]; ++z) {
        for (std::int64_t y = 0; y < logits.shape[1]; ++y) {
            const Half *background = logits[0].row(z, y), *foreground = logits[1].row(z, y);
            for (std::int64_t x = 0; x < logits.shape[2]; ++x) {
                if (!(to_float(foreground[x]) - to_float(background[x]) > odds)) continue;
                const Index block{z, y, x};
                for (int axis = 0; axis < 3; ++axis) {
                    const std::int64_t begin = block[axis] * factor[axis];
                    box.start[axis] = std::min(box.start[axis], begin);
                    box.stop[axis] = std::max(box.stop[axis], std::min(begin + factor[axis], shape[axis]));
                }
            }
        }
    }
    if (box.stop[0] == 0) return std::nullopt;
    return box;
}

Box with_margin(const Box& box, double margin_mm, const std::array<double, 3>& spacing_mm, const Index& shape) {
    Box wider{};
    for (int axis = 0; axis < 3; ++axis) {
        const double voxels = std::ceil(margin_mm / spacing_mm[axis] - 5e-7);  // 0.3 / 0.1 is 3, and a bit
        const auto margin = static_cast<std::int64_t>(std::clamp(voxels, 0.0, static_cast<double>(shape[axis])));
        wider.start[axis] = std::max<std::int64_t>(0, box.start[axis] - margin);
        wider.stop[axis] = std::min(shape[axis], box.stop[axis] + margin);
    }
    return wider;
}

std::array<Sizes, 3> ImagePart::bounds(const std::array<Sizes, 3>& of_part, const Index& shape) const {
    std::array<Sizes, 3> found;
    for (int axis = 0; axis < 3; ++axis) {
        Sizes& along = found[axis];
        along = {0, shape[axis]};
        for (const std::int64_t bound : of_part[axis]) {
            if (axis < 2) along.push_back(std::clamp<std::int64_t>(bound + origin[axis], 0, shape[axis]));
        }
        std::sort(along.begin(), along.end());
        along.erase(std::unique(along.begin(), along.end()), along.end());
    }
    return found;
}

std::optional<ImagePart::Shared> ImagePart::shared(const Box& of_part, const Index& shape) const {
    Shared found{};
    for (int axis = 0; axis < 3; ++axis) {
        const std::int64_t first = of_part.start[axis] + origin[axis];
        const std::int64_t start = std::max<std::int64_t>(first, 0);
        const std::int64_t stop = std::min(of_part.stop[axis] + origin[axis], shape[axis]);
        if (start >= stop) return std::nullopt;
        found.in_image.start[axis] = start;
        found.in_image.stop[axis] = stop;
        found.in_box.start[axis] = start - first;
        found.in_box.stop[axis] = stop - first;
    }
    return found;
}

ImagePart window_part(const Index& shape, const Sizes& patch, const Box& box) {
    ImagePart part{};
    for (int axis = 0; axis < 3; ++axis) {
        const std::int64_t needed = box.stop[axis] - box.start[axis];
        const std::int64_t length = std::max(needed, std::min(patch.at(axis), shape[axis]));
        const std::int64_t begin = std::max<std::int64_t>(0, box.start[axis] - (length - needed) / 2);
        part.origin[axis] = std::min(begin, shape[axis] - length);
        part.size[axis] = length;
    }
    return part;
}

}  // namespace fastnnunet
