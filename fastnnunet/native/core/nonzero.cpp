#include "core/nonzero.hpp"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "core/simd.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

FASTNNUNET_CLONES
void mark_nonzero(const float* values, std::uint8_t* mask, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) mask[i] |= values[i] != 0 ? 1 : 0;
}

}  // namespace

Box nonzero_box(const Volumes<const float>& channels, int threads) {
    const auto [depth, height, width] = channels.shape;
    struct Extent {
        std::int64_t y_start, y_stop = 0, x_start, x_stop = 0;
    };
    std::vector<Extent> planes(depth, Extent{height, 0, width, 0});
    parallel_for(depth, threads, [&, height = height, width = width](std::int64_t z) {
        Extent& extent = planes[z];
        for (std::int64_t channel = 0; channel < channels.count; ++channel) {
            for (std::int64_t y = 0; y < height; ++y) {
                const float* row = channels[channel].row(z, y);
                // Of a row only what lies outside the extent so far can widen it, unless the row itself is new.
                std::int64_t first = 0;
                const bool is_new = y < extent.y_start || y >= extent.y_stop;
                const std::int64_t first_stop = is_new ? width : extent.x_start;
                while (first < first_stop && row[first] == 0) ++first;
                if (first < first_stop) extent.x_start = std::min(extent.x_start, first);
                if (is_new && first == width) continue;
                std::int64_t last = width;
                while (last > extent.x_stop && row[last - 1] == 0) --last;
                extent.x_stop = std::max(extent.x_stop, last);
                extent.y_start = std::min(extent.y_start, y);
                extent.y_stop = std::max(extent.y_stop, y + 1);
            }
        }
    });
    Box box{{depth, height, width}, {0, 0, 0}};
    for (std::int64_t z = 0; z < depth; ++z) {
        const Extent& extent = planes[z];
        if (extent.y_stop == 0) continue;
        box.start = {std::min(box.start[0], z), std::min(box.start[1], extent.y_start),
                     std::min(box.start[2], extent.x_start)};
        box.stop = {z + 1, std::max(box.stop[1], extent.y_stop), std::max(box.stop[2], extent.x_stop)};
    }
    if (box.stop[0] == 0) return {{0, 0, 0}, channels.shape};
    return box;
}

void nonzero_mask(const Volumes<const float>& channels, const Volume<std::uint8_t>& mask, int threads) {
    if (mask.shape != channels.shape) throw std::invalid_argument("nonzero mask: another shape than the image");
    parallel_for(mask.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < mask.shape[1]; ++y) {
            std::uint8_t* row = mask.row(z, y);
            std::fill(row, row + mask.shape[2], std::uint8_t{0});
            for (std::int64_t channel = 0; channel < channels.count; ++channel) {
                mark_nonzero(channels[channel].row(z, y), row, mask.shape[2]);
            }
        }
    });
}

}  // namespace fastnnunet
