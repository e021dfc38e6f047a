#include "predict/locate.hpp"

#include <algorithm>

#include "core/half.hpp"

namespace fastnnunet::engine {
namespace {

constexpr float kCertain = 16;

// Chunks of the image are those of the part and, where they end before it does, others.
class InBoxPass : public Pass {
public:
    InBoxPass(std::unique_ptr<Pass> inner, const ImagePart& part, const Index& shape, bool whole,
              const std::vector<Half>& background)
        : inner_(std::move(inner)), part_(part), background_(background) {
        chunks_.shape = shape;
        chunks_.bounds = part.bounds(inner_->chunks().bounds, shape);
        if (whole) chunks_.bounds = {Sizes{0, shape[0]}, Sizes{0, shape[1]}, Sizes{0, shape[2]}};
    }

    const Chunks& chunks() const override { return chunks_; }

    void run(const Run& run, std::int64_t margin, const Receiver& receive) override {
        const std::unique_ptr<TileLogits> tiles = run.tiles.within(part_);
        const Index grid = chunks_.grid();
        std::vector<bool> given(static_cast<std::size_t>(voxels_of(grid)), false);
        // Background up to a chunk along z and y: each chunk leaves after those before it along both, as its receiver
        // needs, though those of a window do not leave in C order.
        const auto give_up_to = [&](const Index& last) {
            for (std::int64_t z = 0; z <= last[0]; ++z) {
                for (std::int64_t y = 0; y <= last[1]; ++y) {
                    const auto chunk = static_cast<std::size_t>(z * grid[1] + y);
                    if (given[chunk]) continue;
                    given[chunk] = true;
                    receive({z, y, 0}, nothing(run.arithmetic, {z, y, 0}, margin));
                }
            }
        };
        inner_->run({*tiles, run.arithmetic, run.progress}, margin, [&](const Index& number, Array4<Half> logits) {
            const auto shared = part_.shared(inner_->chunks().box(number), chunks_.shape);
            if (!shared) return;
            const Index chunk = chunk_at(shared->in_image.start);
            given[static_cast<std::size_t>(chunk[0] * grid[1] + chunk[1])] = true;
            give_up_to(chunk);
            Array4<Half> all = nothing(run.arithmetic, chunk, margin);
            const Box within = chunks_.box(chunk);
            Box to{}, from = shared->in_box;
            for (int axis = 0; axis < 3; ++axis) {
                const std::int64_t before = axis < 2 ? margin : 0;
                to.start[axis] = shared->in_image.start[axis] - within.start[axis] + before;
                to.stop[axis] = shared->in_image.stop[axis] - within.start[axis] + before;
                from.start[axis] += before;
                from.stop[axis] += before;
            }
            run.arithmetic.copy(part(logits.read(), from), part(all.view(), to));
            receive(chunk, std::move(all));
        });
        give_up_to({grid[0] - 1, grid[1] - 1, 0});
    }

private:
    Index chunk_at(const Index& voxel) const {
        Index number{};
        for (int axis = 0; axis < 3; ++axis) {
            const Sizes& bounds = chunks_.bounds[axis];
            number[axis] = std::upper_bound(bounds.begin(), bounds.end(), voxel[axis]) - bounds.begin() - 1;
        }
        return number;
    }

    // Background for a chunk, and room for the margin before it
    Array4<Half> nothing(Arithmetic& arithmetic, const Index& number, std::int64_t margin) const {
        const Index shape = extent(chunks_.box(number));
        return arithmetic.filled(background_, {shape[0] + margin, shape[1] + margin, shape[2]});
    }

    std::unique_ptr<Pass> inner_;
    ImagePart part_;
    const std::vector<Half>& background_;
    Chunks chunks_;
};

class InBox : public Way {
public:
    InBox(const Way& way, const ImagePart& part, const std::vector<Half>& background)
        : way_(way), part_(part), background_(background) {}

    std::unique_ptr<Pass> begin(const Index& shape, bool whole) const override {
        return std::make_unique<InBoxPass>(way_.begin(part_.size, whole), part_, shape, whole, background_);
    }

    ImagePart crop(const Index& shape, const Box& box) const override { return way_.crop(shape, box); }
    std::unique_ptr<Way> smaller(const Index&) const override {
        std::unique_ptr<Way> inner = way_.smaller(part_.size);
        if (!inner) return nullptr;
        auto made = std::make_unique<InBox>(*inner, part_, background_);
        made->own_ = std::move(inner);
        return made;
    }

    std::string describe() const override { return way_.describe(); }

private:
    const Way& way_;
    std::unique_ptr<Way> own_;  // which `way_` is, where it is no one else's
    ImagePart part_;
    std::vector<Half> background_;
};

// What the locator sees of a preprocessed image, without margin.
std::optional<Box> box_of(const Locating& locating, const Volumes<const float>& data, int threads) {
    const Index& factor = locating.rules.factor;
    Array4<float> blocks(data.count, coarse_shape(data.shape, factor));
    block_means(data, factor, blocks.view(), pass_threads(threads, data.count * voxels_of(data.shape)));
    HostTiles tiles(*locating.network, locating.tiles, blocks.read(), threads);
    HostArithmetic arithmetic(threads);
    const Array4<Half> logits = one_piece(*locating.way, blocks.shape, {tiles, arithmetic, {}});
    return seen_box(logits.read(), locating.rules.threshold, factor, data.shape);
}

}  // namespace

std::vector<Half> background_logits(std::int64_t heads, bool has_regions) {
    std::vector<Half> logits(static_cast<std::size_t>(heads), to_half(-kCertain));
    if (!has_regions) logits[0] = to_half(0);
    return logits;
}

std::unique_ptr<Way> located(const Locating& locating, const Volumes<const float>& data, const Way& way,
                             const std::vector<Half>& background, int threads) {
    const std::optional<Box> seen = box_of(locating, data, threads);
    if (!seen) return nullptr;
    std::array<double, 3> spacing{};
    std::copy(locating.spacing_mm.begin(), locating.spacing_mm.end(), spacing.begin());
    const Box box = with_margin(*seen, locating.rules.margin_mm, spacing, data.shape);
    const ImagePart part = way.crop(data.shape, box);
    if (part.voxels() >= voxels_of(data.shape)) return nullptr;
    return std::make_unique<InBox>(way, part, background);
}

}  // namespace fastnnunet::engine
