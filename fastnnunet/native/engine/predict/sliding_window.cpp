// Tiles in, logits out: nnU-Net's sliding window with Gaussian weights, its float16 roundings included.
//
// nnU-Net adds `logits * gaussian` (float32) to a float16 array, sums the weights in float16 and divides in float16.
// Here the array may be in chunks, each of which is handed out when its last tile has come.
#include <list>
#include <map>
#include <sstream>

#include "core/accumulate.hpp"
#include "core/gaussian.hpp"
#include "core/half.hpp"
#include "core/threads.hpp"
#include "error.hpp"
#include "predict/ways.hpp"

namespace fastnnunet::engine {
namespace {

// The weights of a tile, and their sums over all tiles of an image, which are kept for the next one of its shape.
class Weights {
public:
    Weights(const Sizes& patch, double step_size, bool use_gaussian) : patch_(patch), step_size_(step_size) {
        const Index tile = patch.size() == 2 ? Index{1, patch[0], patch[1]} : Index{patch[0], patch[1], patch[2]};
        values_ = Array3<float>(tile);
        halves_ = Array4<Half>(1, tile);
        if (use_gaussian) {
            const std::vector<float> gaussian = gaussian_weights(patch);
            std::copy(gaussian.begin(), gaussian.end(), values_.values.get());
        } else {
            values_.fill(1);
        }
        for (std::int64_t i = 0; i < values_.size(); ++i) halves_.values[i] = to_half(values_.values[i]);  // exact
    }

    Volume<const float> tile() const { return values_.read(); }

    // The sum of the weights of all tiles at every voxel of a window, padding included, rounded after each one. The
    // padded image begins at the window's first tile.
    std::shared_ptr<const Array4<Half>> total(const ChunkedWindow& window, int threads) const {
        Index padded{}, first{};
        for (int axis = 0; axis < 3; ++axis) {
            first[axis] = window.starts()[axis].front();
            padded[axis] = window.starts()[axis].back() + window.tile()[axis] - first[axis];
        }
        const std::lock_guard lock(turn_);
        for (const auto& kept : kept_) {
            if (kept->shape == padded) return kept;
        }
        auto made = std::make_shared<Array4<Half>>(1, padded);
        std::fill(made->values.get(), made->values.get() + made->size(), Half{0});
        for (std::int64_t number = 0; number < window.tiles(); ++number) {
            Index start = window.tile_start(number);
            Box box{};
            for (int axis = 0; axis < 3; ++axis) {
                box.start[axis] = start[axis] - first[axis];
                box.stop[axis] = box.start[axis] + window.tile()[axis];
            }
            add_halves(halves_.read(), part(made->view(), box), pass_threads(threads, halves_.size()));
        }
        kept_.push_front(made);
        if (kept_.size() > 2) kept_.pop_back();
        return made;
    }

private:
    Sizes patch_;
    double step_size_;
    Array3<float> values_;
    Array4<Half> halves_;
    mutable std::mutex turn_;
    mutable std::list<std::shared_ptr<const Array4<Half>>> kept_;
};

struct Window {
    Tiles tiles;
    double step_size;
    Weights weights;
};

class WindowPass : public Pass {
public:
    WindowPass(const Window& window, ChunkedWindow grid)
        : window_(window), grid_(std::move(grid)), chunks_{grid_.shape(), grid_.bounds()} {}

    const Chunks& chunks() const override { return chunks_; }

    void run(const Volumes<const float>& data, const Run& run, std::int64_t margin, const Receiver& receive) override {
        const Tiles& tiles = window_.tiles;
        const Index tile = grid_.tile();
        const std::int64_t voxels = voxels_of(tile), count = grid_.tiles();
        const std::int64_t size = std::max<std::int64_t>(1, std::min({kMaxBatch, kBatchVoxels / voxels, count}));
        const auto batch = allocate<float>(size * tiles.channels * voxels);
        const auto logits = allocate<float>(size * tiles.heads * voxels);
        total_ = window_.weights.total(grid_, run.threads);
        left_ = grid_.tiles_per_chunk();
        for (std::int64_t first = 0; first < count; first += size) {
            const std::int64_t now = std::min(size, count - first);
            for (std::int64_t i = 0; i < now; ++i) {
                cut_out(data, grid_.tile_start(first + i), tile, batch.get() + i * tiles.channels * voxels,
                        run.threads);
            }
            run_mirrored(run.network, batch.get(), now, tiles, tiles.patch_size, logits.get());
            for (std::int64_t i = 0; i < now; ++i) {
                const Volumes<const float> of_tile{
                    logits.get() + i * tiles.heads * voxels, tiles.heads, voxels, tile, {tile[1] * tile[2], tile[2]}};
                add(first + i, of_tile, run.threads, margin, receive);
                if (run.progress) run.progress(first + i + 1, count);
            }
        }
    }

private:
    static Box inside(const Index& shape, std::int64_t margin) {
        return {{margin, margin, 0}, {shape[0] + margin, shape[1] + margin, shape[2]}};
    }

    void add(std::int64_t tile, const Volumes<const float>& logits, int threads, std::int64_t margin,
             const Receiver& receive) {
        const Index grid = grid_.grid();
        for (const Index& number : grid_.chunks_of(tile)) {
            const ChunkedWindow::Overlap overlap = grid_.overlap(tile, number);
            const Index shape = extent(grid_.chunk(number));
            auto found = sums_.find(number);
            // a chunk of which every voxel is written need not be zero before
            const bool is_first = found == sums_.end() && extent(overlap.in_tile) == shape;
            if (found == sums_.end()) {
                Array4<Half> made(logits.count, {shape[0] + margin, shape[1] + margin, shape[2]});
                if (!is_first) std::fill(made.values.get(), made.values.get() + made.size(), Half{0});
                found = sums_.emplace(number, std::move(made)).first;
            }
            const Volumes<Half> sums = part(part(found->second.view(), inside(shape, margin)), overlap.in_chunk);
            add_weighted(part(logits, overlap.in_tile), part(window_.weights.tile(), overlap.in_tile), sums, is_first,
                         pass_threads(threads, sums.count * voxels_of(sums.shape)));
            if (--left_[(number[0] * grid[1] + number[1]) * grid[2] + number[2]] == 0) {
                Array4<Half> finished = std::move(found->second);
                sums_.erase(found);
                finish(number, finished, margin, threads);
                receive(number, std::move(finished));
            }
        }
    }

    void finish(const Index& number, const Array4<Half>& sums, std::int64_t margin, int threads) const {
        Box box = grid_.chunk(number);
        const Volumes<Half> values = part(sums.view(), inside(extent(box), margin));
        for (int axis = 0; axis < 3; ++axis) {
            const std::int64_t below = -grid_.starts()[axis].front();
            box.start[axis] += below;
            box.stop[axis] += below;
        }
        const QuotientLimits limits = divide(values, part(total_->read(), box)[0],
                                             pass_threads(threads, values.count * voxels_of(values.shape), 8));
        check_half(limits.sum_low, limits.sum_high, "the weighted logits");
        check_half(limits.quotient_low, limits.quotient_high, "the logits");
    }

    const Window& window_;
    ChunkedWindow grid_;
    Chunks chunks_;
    std::shared_ptr<const Array4<Half>> total_;
    std::vector<std::int32_t> left_;
    std::map<Index, Array4<Half>> sums_;
};

class SlidingWindow : public Way {
public:
    SlidingWindow(const Tiles& tiles, double step_size, bool use_gaussian)
        : window_{tiles, step_size, {tiles.patch_size, step_size, use_gaussian}}, use_gaussian_(use_gaussian) {}

    std::unique_ptr<Pass> begin(const Index& shape, bool whole) const override {
        const Sizes& patch = window_.tiles.patch_size;
        return std::make_unique<WindowPass>(window_,
                                            whole ? ChunkedWindow::of_chunks(shape, patch, window_.step_size, shape)
                                                  : ChunkedWindow::streamed(shape, patch, window_.step_size));
    }

    ImagePart crop(const Index& shape, const Box& box) const override {
        return window_part(shape, window_.tiles.patch_size, box);
    }

    std::unique_ptr<Way> smaller(const Index&) const override { return nullptr; }

    std::string describe() const override {
        std::ostringstream text;
        text << "\"way\": \"window\", \"step_size\": " << python_real(window_.step_size)
             << ", \"use_gaussian\": " << (use_gaussian_ ? "true" : "false");
        return text.str();
    }

private:
    Window window_;
    bool use_gaussian_;
};

}  // namespace

std::unique_ptr<Way> sliding_window(const Tiles& tiles, double step_size, bool use_gaussian) {
    return std::make_unique<SlidingWindow>(tiles, step_size, use_gaussian);
}

}  // namespace fastnnunet::engine
