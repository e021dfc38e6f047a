// Where an image is not zero, and nnU-Net's normalisation: core/nonzero.cpp and core/normalize.cpp on a GPU.
#include <algorithm>
#include <limits>

#include "device/volumes.hpp"

namespace fastnnunet::engine {
namespace {

cuda::Region region_of(const Volume<float>& channel) {
    cuda::Region region{channel.data, {}, channel.stride[0], channel.stride[1]};
    std::copy(channel.shape.begin(), channel.shape.end(), region.shape);
    return region;
}

// How often NumPy halves so many values until none of the parts has more than a leaf
int pairwise_depth(std::int64_t count) {
    std::vector<std::int64_t> sizes{count};
    int depth = 0;
    while (*std::max_element(sizes.begin(), sizes.end()) > cuda::kLeaf) {
        std::vector<std::int64_t> halves;
        for (const std::int64_t size : sizes) {
            if (size <= cuda::kLeaf) continue;
            const std::int64_t half = size / 2 - size / 2 % cuda::kLeafLanes;
            for (const std::int64_t part : {half, size - half}) {
                if (std::find(halves.begin(), halves.end(), part) == halves.end()) halves.push_back(part);
            }
        }
        sizes = std::move(halves);
        ++depth;
    }
    return depth;
}

// Mean and standard deviation, as NumPy computes them of the values in this order
DeviceMemory<float> moments(const Stream& stream, const Volume<float>& channel) {
    const std::int64_t count = voxels_of(channel.shape);
    const int depth = pairwise_depth(count);
    DeviceMemory<float> out = stream.memory<float>(2);
    stream.clear(out.get(), 2 * sizeof(float));
    for (const cuda::Finish what : {cuda::kMean, cuda::kDeviation}) {
        DeviceMemory<float> sums = stream.memory<float>(std::int64_t{1} << depth);
        const std::int64_t blocks = ((std::int64_t{1} << depth) + cuda::kLeavesPerBlock - 1) / cuda::kLeavesPerBlock;
        stream.start_pairwise_leaves(
            grid_of_blocks(blocks),
            {region_of(channel), what == cuda::kMean ? nullptr : out.get(), sums.get(), depth});
        for (int left = depth; left > 0;) {
            const int levels = std::min(left, cuda::kMostLevels);
            DeviceMemory<float> combined = stream.memory<float>(std::int64_t{1} << (left - levels));
            stream.start_pairwise_combine(grid_of_blocks(std::int64_t{1} << (left - levels)),
                                          {sums.get(), combined.get(), count, left, levels});
            sums = std::move(combined);
            left -= levels;
        }
        stream.start_finish_moments({1, 1, 1}, {sums.get(), nullptr, out.get(), count, what});
    }
    return out;
}

struct Scaling {
    float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
    float shift = 0, divisor = 1;
};

void scale(const Stream& stream, const Volume<float>& channel, const Scaling& by, const float* moments = nullptr) {
    stream.start_scale(grid_of(channel.shape[2], channel.rows()),
                       {region_of(channel), moments, by.low, by.high, by.shift, by.divisor});
}

}  // namespace

Box nonzero_box(const Stream& stream, const Volumes<const float>& contiguous) {
    std::array<std::uint32_t, 6> box{~0u, ~0u, ~0u, 0, 0, 0};
    const DeviceMemory<std::uint32_t> there = stream.upload(box.data(), 6);
    cuda::BoxParams params{contiguous.data, there.get(), contiguous.count, {}};
    std::copy(contiguous.shape.begin(), contiguous.shape.end(), params.shape);
    const std::int64_t rows = contiguous.count * contiguous.shape[0] * contiguous.shape[1];
    stream.start_nonzero_box(grid_of(contiguous.shape[2], rows, 1, true), params);
    stream.download(box.data(), there.get(), sizeof box);
    if (box[3] == 0) return {{0, 0, 0}, contiguous.shape};
    return {{box[0], box[1], box[2]}, {box[3], box[4], box[5]}};
}

void normalize(const Stream& stream, const Volume<float>& channel, const std::string& scheme, const Json* intensity) {
    if (scheme == "ZScoreNormalization") {
        scale(stream, channel, {}, moments(stream, channel).get());
    } else if (scheme == "CTNormalization") {
        const auto known = [&](const char* name) { return static_cast<float>(intensity->find(name)->real()); };
        scale(stream, channel, {known("percentile_00_5"), known("percentile_99_5"), known("mean"), known("std")});
    } else if (scheme == "RescaleTo01Normalization") {
        const DeviceMemory<float> range = stream.memory<float>(2);
        const DeviceMemory<cuda::Limits> limits = limits_of(stream, device_volume(channel));
        stream.start_finish_moments({1, 1, 1}, {nullptr, limits.get(), range.get(), 0, cuda::kRange});
        scale(stream, channel, {}, range.get());
    } else if (scheme == "RGBTo01Normalization") {
        cuda::Limits found{};
        stream.download(&found, limits_of(stream, device_volume(channel)).get(), sizeof found);
        check_colours({cuda::value_of_key(found.low), cuda::value_of_key(found.high)});
        scale(stream, channel, {Scaling{}.low, Scaling{}.high, 0, 255});
    }
}

}  // namespace fastnnunet::engine
