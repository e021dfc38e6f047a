#include "predict/ways.hpp"

#include "core/threads.hpp"

namespace fastnnunet::engine {
namespace {

std::int64_t product(const Sizes& sizes) {
    std::int64_t made = 1;
    for (const std::int64_t size : sizes) made *= size;
    return made;
}

// use(row of `values`, row that it is after mirroring, whether x is reversed) for every row
template <class Use>
void for_each_mirrored_row(std::int64_t volumes, const Sizes& tile, const std::vector<int>& flipped, const Use& use) {
    const std::size_t first = 3 - tile.size();
    std::array<std::int64_t, 3> size{1, 1, 1};
    std::array<bool, 3> flips{};
    for (std::size_t axis = 0; axis < tile.size(); ++axis) size[first + axis] = tile[axis];
    for (const int axis : flipped) flips[first + static_cast<std::size_t>(axis)] = true;
    for (std::int64_t volume = 0; volume < volumes; ++volume) {
        for (std::int64_t z = 0; z < size[0]; ++z) {
            for (std::int64_t y = 0; y < size[1]; ++y) {
                const std::int64_t to_z = flips[0] ? size[0] - 1 - z : z, to_y = flips[1] ? size[1] - 1 - y : y;
                const std::int64_t plane = volume * size[0];
                use((plane + z) * size[1] + y, (plane + to_z) * size[1] + to_y, flips[2]);
            }
        }
    }
}

// Logits (N, H, tile) into `logits`, the mean over every subset of the mirrored axes as nnU-Net sums them.
void run_mirrored(const Network& network, const float* batch, std::int64_t count, const Tiles& tiles, const Sizes& tile,
                  float* logits) {
    network.run(batch, count, tile, logits);
    const auto flips = subsets(tiles.mirror_axes);
    if (flips.size() == 1) return;
    const std::int64_t voxels = product(tile), width = tile.back();
    const auto copy = allocate<float>(count * tiles.channels * voxels);
    const auto part = allocate<float>(count * tiles.heads * voxels);
    for (std::size_t i = 1; i < flips.size(); ++i) {
        for_each_mirrored_row(count * tiles.channels, tile, flips[i],
                              [&](std::int64_t from, std::int64_t to, bool flip) {
            const float* row = batch + from * width;
            if (flip) {
                std::reverse_copy(row, row + width, copy.get() + to * width);
            } else {
                std::copy(row, row + width, copy.get() + to * width);
            }
        });
        network.run(copy.get(), count, tile, part.get());
        for_each_mirrored_row(count * tiles.heads, tile, flips[i], [&](std::int64_t from, std::int64_t to, bool flip) {
            const float* row = part.get() + from * width;
            float* sum = logits + to * width;
            if (flip) {
                for (std::int64_t x = 0; x < width; ++x) sum[x] += row[width - 1 - x];
            } else {
                for (std::int64_t x = 0; x < width; ++x) sum[x] += row[x];
            }
        });
    }
    const auto divisor = static_cast<float>(flips.size());
    for (std::int64_t i = 0; i < count * tiles.heads * voxels; ++i) logits[i] /= divisor;
}

// The part of an image that begins at `origin`, which may lie before it, zeros around it; contiguous (C, tile).
void cut_out(const Volumes<const float>& image, const Index& origin, const Index& tile, float* out, int threads) {
    parallel_for(image.count * tile[0], pass_threads(threads, image.count * voxels_of(tile)), [&](std::int64_t number) {
        const std::int64_t channel = number / tile[0], z = origin[0] + number % tile[0];
        for (std::int64_t row = 0; row < tile[1]; ++row) {
            float* to = out + (number * tile[1] + row) * tile[2];
            const std::int64_t y = origin[1] + row;
            if (z < 0 || z >= image.shape[0] || y < 0 || y >= image.shape[1]) {
                std::fill(to, to + tile[2], 0.0f);
                continue;
            }
            const float* from = image[channel].row(z, y);
            const std::int64_t lower = std::clamp<std::int64_t>(-origin[2], 0, tile[2]);
            const std::int64_t upper = std::clamp<std::int64_t>(image.shape[2] - origin[2], lower, tile[2]);
            std::fill(to, to + lower, 0.0f);
            std::copy(from + origin[2] + lower, from + origin[2] + upper, to + lower);
            std::fill(to + upper, to + tile[2], 0.0f);
        }
    });
}

}  // namespace

Index Chunks::grid() const {
    Index count{};
    for (int axis = 0; axis < 3; ++axis) count[axis] = static_cast<std::int64_t>(bounds[axis].size()) - 1;
    return count;
}

Box Chunks::box(const Index& number) const {
    Box box{};
    for (int axis = 0; axis < 3; ++axis) {
        box.start[axis] = bounds[axis].at(number[axis]);
        box.stop[axis] = bounds[axis].at(number[axis] + 1);
    }
    return box;
}

Array4<Half> one_piece(const Way& way, const Index& shape, const Run& run) {
    return in_memory(way, shape, [&](const Way& one) {
        Array4<Half> whole;
        one.begin(shape, true)->run(run, 0, [&](const Index&, Array4<Half> logits) { whole = std::move(logits); });
        return whole;
    });
}

std::vector<std::vector<int>> subsets(const std::vector<int>& axes) {
    std::vector<std::vector<int>> found;
    for (std::size_t count = 0; count <= axes.size(); ++count) {
        std::vector<std::size_t> chosen(count);
        for (std::size_t i = 0; i < count; ++i) chosen[i] = i;
        while (true) {
            std::vector<int> subset;
            for (const std::size_t i : chosen) subset.push_back(axes[i]);
            found.push_back(subset);
            std::size_t i = count;
            while (i > 0 && chosen[i - 1] == axes.size() - count + i - 1) --i;
            if (i == 0) break;
            ++chosen[i - 1];
            for (std::size_t j = i; j < count; ++j) chosen[j] = chosen[j - 1] + 1;
        }
    }
    return found;
}

Volumes<const float> HostTiles::of(const std::vector<Index>& origins, const Index& tile) {
    const auto count = static_cast<std::int64_t>(origins.size());
    const std::int64_t voxels = voxels_of(tile), in = model_.channels * voxels;
    const auto at_least = [](Array4<float>& buffer, std::int64_t size) {
        if (buffer.size() < size) buffer = Array4<float>(1, {1, 1, size});
        return buffer.values.get();
    };
    const Sizes of_network(tile.end() - static_cast<long>(model_.patch_size.size()), tile.end());
    const auto as_tiles = [&](const float* logits) -> Volumes<const float> {
        return {logits, count * model_.heads, voxels, tile, {tile[1] * tile[2], tile[2]}};
    };
    kept_.reset();  // what is next may lie where these are
    float* batch = at_least(batch_, count * in);
    for (std::int64_t i = 0; i < count; ++i) {
        cut_out(image_, origins[static_cast<std::size_t>(i)], tile, batch + i * in, threads_);
    }
    if (model_.mirror_axes.empty()) {
        kept_ = network_.run_in_place(batch, count, of_network);
        if (kept_) return as_tiles(kept_.get());
    }
    float* logits = at_least(logits_, count * model_.heads * voxels);
    run_mirrored(network_, batch, count, model_, of_network, logits);
    return as_tiles(logits);
}

std::unique_ptr<TileLogits> HostTiles::within(const ImagePart& part) const {
    Array4<float> cut(image_.count, part.size);
    cut_out(image_, part.origin, part.size, cut.values.get(), threads_);
    auto made = std::make_unique<HostTiles>(network_, model_, cut.read(), threads_);
    made->own_ = std::move(cut);
    return made;
}

}  // namespace fastnnunet::engine
