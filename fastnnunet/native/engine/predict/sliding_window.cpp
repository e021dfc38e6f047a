// Tiles in, logits out: nnU-Net's sliding window with Gaussian weights, its float16 roundings included.
//
// nnU-Net adds `logits * gaussian` (float32) to a float16 array, sums the weights in float16 and divides in float16.
// Here the array may be in chunks, each of which is handed out when its last tile has come.
#include <map>
#include <sstream>

#include "error.hpp"
#include "predict/ways.hpp"

namespace fastnnunet::engine {
namespace {

struct Window {
    Tiles tiles;
    double step_size;
    TileWeights weights;
};

class WindowPass : public Pass {
public:
    WindowPass(const Window& window, ChunkedWindow grid)
        : window_(window), grid_(std::move(grid)), chunks_{grid_.shape(), grid_.bounds()} {}

    const Chunks& chunks() const override { return chunks_; }

    void run(const Run& run, std::int64_t margin, const Receiver& receive) override {
        const Index tile = grid_.tile();
        const std::int64_t voxels = voxels_of(tile), count = grid_.tiles(), heads = window_.tiles.heads;
        const std::int64_t size = std::max<std::int64_t>(1, std::min({kMaxBatch, kBatchVoxels / voxels, count}));
        weights_ = run.arithmetic.weights(window_.weights, grid_);
        left_ = grid_.tiles_per_chunk();
        std::vector<Index> origins;
        for (std::int64_t first = 0; first < count; first += size) {
            origins.clear();
            for (std::int64_t i = first; i < std::min(first + size, count); ++i) origins.push_back(grid_.tile_start(i));
            Volumes<const float> logits = run.tiles.of(origins, tile);
            logits.count = heads;
            for (std::int64_t i = first; i < first + static_cast<std::int64_t>(origins.size()); ++i) {
                add(i, logits, run.arithmetic, margin, receive);
                logits.data += heads * logits.count_stride;
                if (run.progress) run.progress(i + 1, count);
            }
        }
    }

private:
    static Box inside(const Index& shape, std::int64_t margin) {
        return {{margin, margin, 0}, {shape[0] + margin, shape[1] + margin, shape[2]}};
    }

    void add(std::int64_t tile, const Volumes<const float>& logits, Arithmetic& arithmetic, std::int64_t margin,
             const Receiver& receive) {
        const Index grid = grid_.grid();
        for (const Index& number : grid_.chunks_of(tile)) {
            const ChunkedWindow::Overlap overlap = grid_.overlap(tile, number);
            const Index shape = extent(grid_.chunk(number));
            auto found = sums_.find(number);
            // a chunk of which every voxel is written need not be zero before
            const bool is_first = found == sums_.end() && extent(overlap.in_tile) == shape;
            if (found == sums_.end()) {
                const Index held{shape[0] + margin, shape[1] + margin, shape[2]};
                found = sums_.emplace(number, is_first ? arithmetic.empty(logits.count, held)
                                                       : arithmetic.zeros(logits.count, held)).first;
            }
            const Volumes<Half> sums = part(part(found->second.view(), inside(shape, margin)), overlap.in_chunk);
            const Volume<const float> weights = part(weights_.tile.read()[0], overlap.in_tile);
            arithmetic.add_weighted(part(logits, overlap.in_tile), &weights, sums, is_first);
            if (--left_[(number[0] * grid[1] + number[1]) * grid[2] + number[2]] == 0) {
                Array4<Half> finished = std::move(found->second);
                sums_.erase(found);
                finish(number, finished, arithmetic, margin);
                receive(number, std::move(finished));
            }
        }
    }

    void finish(const Index& number, const Array4<Half>& sums, Arithmetic& arithmetic, std::int64_t margin) const {
        Box box = grid_.chunk(number);
        const Volumes<Half> values = part(sums.view(), inside(extent(box), margin));
        for (int axis = 0; axis < 3; ++axis) {
            const std::int64_t below = -grid_.starts()[axis].front();
            box.start[axis] += below;
            box.stop[axis] += below;
        }
        arithmetic.divide(values, part(weights_.total.read(), box)[0], "the weighted logits");
    }

    const Window& window_;
    ChunkedWindow grid_;
    Chunks chunks_;
    WindowWeights weights_;
    std::vector<std::int32_t> left_;
    std::map<Index, Array4<Half>> sums_;
};

class SlidingWindow : public Way {
public:
    SlidingWindow(const Tiles& tiles, double step_size, bool use_gaussian)
        : window_{tiles, step_size, {tiles.patch_size, use_gaussian}}, use_gaussian_(use_gaussian) {}

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
