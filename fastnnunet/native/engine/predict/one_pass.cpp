// One pass over an image: few large tiles, each voxel kept from one of them, no weights.
//
// For networks whose output at a voxel depends on a halo around it alone. Logits are rounded to float16 as those of the
// window, so that whatever comes after is the same code.
#include <cctype>
#include <cmath>
#include <tuple>

#include "error.hpp"
#include "predict/preprocess.hpp"
#include "predict/ways.hpp"

namespace fastnnunet::engine {
namespace {

constexpr std::int64_t kDefaultLimit = std::int64_t{2} << 30;

std::string list_text(const Sizes& sizes) {
    std::string text = "[";
    for (std::size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
    return text + "]";
}

// A size that `parse_memory` takes and that is at least this large
std::string memory_words(std::int64_t bytes) {
    const std::int64_t unit = bytes >= 10 * (1 << 20) ? 1 << 20 : 1 << 10;
    return std::to_string((bytes + unit - 1) / unit) + (unit == 1 << 20 ? "M" : "K");
}

struct Settings {
    Tiles tiles;
    OnePass rules;
    OnePassSettings given;

    bool is_2d() const { return tiles.patch_size.size() == 2; }

    TileAxes axes(const Index& shape) const {
        const std::size_t first = 3 - tiles.patch_size.size();  // 2d: planes have no neighbours
        TileAxes axes{};
        for (std::size_t n = 0; n < tiles.patch_size.size(); ++n) {
            axes[first + n] = {
                shape[first + n],   tiles.patch_size[n],
                rules.multiples[n], rules.halo[n],
                given.passes,       given.largest_tile.empty() ? std::nullopt : std::optional(given.largest_tile[n])};
        }
        if (first == 1) {
            const std::int64_t frame = axes[1].frame() * axes[2].frame();
            const std::int64_t planes = std::max<std::int64_t>(1, std::min(kMaxBatch, kBatchVoxels / frame));
            axes[0] = {shape[0], 1, 1, 0, given.passes, planes};
        }
        return axes;
    }

    std::int64_t tile_bytes(const Index& tile) const {
        const double numbers = static_cast<double>(voxels_of(tile) * rules.bytes_per_voxel);
        return static_cast<std::int64_t>(std::ceil(numbers * given.overhead));
    }

    // Throws SpecError where the smallest tile is too large.
    void refuse(const TileAxes& axes, const TileCost& cost, const std::string& what) const {
        const std::optional<std::int64_t> least = least_cost(axes, cost);
        if (!least) {
            Sizes need;
            for (const TileAxis& axis : axes) need.push_back(2 * axis.halo + 1);
            throw SpecError(what + " needs tiles of at least " + list_text(need) + " voxels, in multiples of " +
                            list_text(rules.multiples) + "; the engine takes up to " + list_text(given.largest_tile) +
                            "\nbuild it for larger tiles, or give a -step_size");
        }
        if (given.memory_limit > 0 && *least > given.memory_limit) {
            throw SpecError("memory limit: got " + memory_words(given.memory_limit) + ", " + what + " needs at least " +
                            memory_words(*least) + " for one tile\ngive --memory-limit " + memory_words(*least) +
                            " or more, or a -step_size for nnU-Net's window");
        }
    }

    // Of a tile of an image of that shape
    TileCost cost_in(const Index& shape) const {
        return [this, shape](const Index& tile) {
            return tile_bytes(tile) + 2 * tiles.heads * tile[0] * tile[1] * shape[2];  // float16, of a whole band
        };
    }

    std::int64_t limit_in(const TileAxes& along, const TileCost& cost) const {
        if (given.memory_limit > 0) return given.memory_limit;
        return std::max(kDefaultLimit, least_cost(along, cost).value_or(0));
    }

    Tiling tiling(const Index& shape) const {
        const TileAxes along = axes(shape);
        const TileCost cost = cost_in(shape);
        std::optional<Tiling> found = fewest_tiles(along, cost, limit_in(along, cost));
        if (!found) {
            refuse(along, cost,
                   "an image of " + std::to_string(shape[0]) + " x " + std::to_string(shape[1]) + " x " +
                       std::to_string(shape[2]) + " voxels");
            throw Error(FASTNNUNET_INTERNAL, "a tile that fits was not found");
        }
        return *found;
    }
};

class OnePassRun : public Pass {
public:
    OnePassRun(const Settings& settings, const Index& shape, bool whole)
        : settings_(settings), tiling_(settings.tiling(shape)), is_whole_(whole) {
        chunks_.shape = shape;
        for (int axis = 0; axis < 3; ++axis) {
            chunks_.bounds[axis] = tiling_.cuts[axis].kept;
            if (whole || axis == 2) chunks_.bounds[axis] = {0, shape[axis]};
        }
        is_whole_ = chunks_.grid() == Index{1, 1, 1};
    }

    const Chunks& chunks() const override { return chunks_; }

    void run(const Run& run, std::int64_t margin, const Receiver& receive) override {
        const Index grid = tiling_.grid(), tile = tiling_.tile();
        const std::int64_t total = voxels_of(grid) * tiling_.shifts();
        std::int64_t done = 0;
        Array4<Half> sums;
        for (std::int64_t index = 0; index < voxels_of(grid); ++index) {
            const Index number{index / (grid[1] * grid[2]), index / grid[2] % grid[1], index % grid[2]};
            const Index chunk = is_whole_ ? Index{0, 0, 0} : Index{number[0], number[1], 0};
            const Box within = chunks_.box(chunk);
            const Index shape = extent(within);
            if (is_at(number, {0, 0, 0})) {
                sums = run.arithmetic.empty(settings_.tiles.heads,
                                            {shape[0] + margin, shape[1] + margin, shape[2]});
            }
            const Box kept = tiling_.kept(number);
            Box in_sums{};
            for (int axis = 0; axis < 3; ++axis) {
                const std::int64_t before = axis < 2 ? margin : 0;
                in_sums.start[axis] = kept.start[axis] - within.start[axis] + before;
                in_sums.stop[axis] = kept.stop[axis] - within.start[axis] + before;
            }
            const Volumes<Half> target = part(sums.view(), in_sums);
            for (std::int64_t shift = 0; shift < tiling_.shifts(); ++shift) {
                const Index origin = tiling_.origin(number, shift);
                const Volumes<const float> of_tile = predict(run, origin, tile);
                Box inner{};
                for (int axis = 0; axis < 3; ++axis) {
                    inner.start[axis] = kept.start[axis] - origin[axis];
                    inner.stop[axis] = kept.stop[axis] - origin[axis];
                }
                run.arithmetic.add_weighted(part(of_tile, inner), nullptr, target, shift == 0);
                if (run.progress) run.progress(++done, total);
            }
            if (is_at(number, {grid[0] - 1, grid[1] - 1, grid[2] - 1})) {
                run.arithmetic.divide(
                    part(sums.view(), {{margin, margin, 0}, {shape[0] + margin, shape[1] + margin, shape[2]}}),
                    tiling_.shifts(), "the logits");
                receive(chunk, std::move(sums));
            }
        }
    }

private:
    // Whether a tile is that corner of its chunk.
    bool is_at(const Index& number, const Index& corner) const {
        return number[2] == corner[2] && (!is_whole_ || (number[0] == corner[0] && number[1] == corner[1]));
    }

    // Logits (H, tile); of 2d networks plane by plane
    Volumes<const float> predict(const Run& run, const Index& origin, const Index& tile) const {
        if (!settings_.is_2d()) return run.tiles.of({origin}, tile);
        std::vector<Index> planes;
        for (std::int64_t z = 0; z < tile[0]; ++z) planes.push_back({origin[0] + z, origin[1], origin[2]});
        Volumes<const float> logits = run.tiles.of(planes, {1, tile[1], tile[2]});
        logits.count = settings_.tiles.heads;
        logits.shape = tile;
        logits.stride[0] = logits.count * logits.count_stride;
        return logits;
    }

    const Settings& settings_;
    Tiling tiling_;
    bool is_whole_;
    Chunks chunks_;
};

class OnePassTiles : public Way {
public:
    explicit OnePassTiles(Settings settings) : settings_(std::move(settings)) {
        const std::int64_t most = *std::max_element(settings_.rules.multiples.begin(), settings_.rules.multiples.end());
        if (settings_.given.passes < 1 || settings_.given.passes > most) {
            throw SpecError("passes: got " + std::to_string(settings_.given.passes) + ", expected 1 to " +
                            std::to_string(most) + ", the largest product of the strides");
        }
        Index patch{1, 1, 1};
        const Sizes& size = settings_.tiles.patch_size;
        std::copy(size.begin(), size.end(), patch.end() - static_cast<long>(size.size()));
        settings_.refuse(settings_.axes(patch), [&](const Index& tile) { return settings_.tile_bytes(tile); },
                         "this model");
    }

    std::unique_ptr<Pass> begin(const Index& shape, bool whole) const override {
        return std::make_unique<OnePassRun>(settings_, shape, whole);
    }

    std::unique_ptr<Way> smaller(const Index& shape) const override {
        const TileAxes along = settings_.axes(shape);
        const TileCost cost = settings_.cost_in(shape);
        const std::optional<std::int64_t> limit = smaller_limit(along, cost, settings_.limit_in(along, cost));
        if (!limit) return nullptr;
        auto made = std::make_unique<OnePassTiles>(*this);
        made->settings_.given.memory_limit = *limit;
        return made;
    }

    // At least a patch, against the strides as in the whole image
    ImagePart crop(const Index& shape, const Box& box) const override {
        const TileAxes along = settings_.axes(shape);
        ImagePart part{};
        for (int axis = 0; axis < 3; ++axis) {
            std::tie(part.origin[axis], part.size[axis]) = along[axis].crop(box.start[axis], box.stop[axis]);
        }
        return part;
    }

    std::string describe() const override {
        const std::int64_t passes = settings_.given.passes, limit = settings_.given.memory_limit;
        return "\"way\": \"" + (passes == 1 ? std::string("one pass") : std::to_string(passes) + " passes") +
               "\", \"passes\": " + std::to_string(passes) + ", \"halo\": " + list_text(settings_.rules.halo) +
               ", \"halo_is\": " + json_text(settings_.rules.halo_is) +
               ", \"memory_limit_bytes\": " + (limit == 0 ? "null" : std::to_string(limit));
    }

private:
    Settings settings_;
};

}  // namespace

std::unique_ptr<Way> one_pass(const Tiles& tiles, const OnePass& rules, const OnePassSettings& settings) {
    return std::make_unique<OnePassTiles>(Settings{tiles, rules, settings});
}

std::int64_t parse_memory(const std::string& text) {
    const std::optional<Measured> given = parse_measured(text, 6);
    double bytes = 0;
    bool is_size = false;
    if (given) {
        std::string unit = given->unit;
        for (char& letter : unit) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
        const std::size_t power = unit.empty() ? std::string::npos : std::string("KMGT").find(unit[0]);
        const std::string rest = power == std::string::npos ? unit : unit.substr(1);
        const double factor = power == std::string::npos ? 1 : std::pow(1024.0, static_cast<double>(power + 1));
        is_size = rest.empty() || rest == "B" || rest == "IB";
        if (is_size) bytes = std::floor(given->number * factor);
    }
    if (!(bytes >= 1 && bytes < 9e18)) {
        throw SpecError("memory limit: got " + (is_size ? "0" : python_text(text)) +
                        ", expected a size such as 4G or 800M");
    }
    return static_cast<std::int64_t>(bytes);
}

}  // namespace fastnnunet::engine
