// How the logits of an image come about: nnU-Net's sliding window, or one pass. As fastnnunet/runtime.
//
// Logits leave in chunks, layers of z in bands of y and whole along x, each after those before it along z and along y,
// or as one chunk. Values do not depend on the chunks. Axes: C channel, H head, N tile in a batch, Z Y X space; 2d tiles
// are single planes Z.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "backends/plugins.hpp"
#include "core/locate.hpp"
#include "core/tiles.hpp"
#include "core/window.hpp"
#include "error.hpp"
#include "predict/arithmetic.hpp"

namespace fastnnunet::engine {

// Chunks of an image's logits.
struct Chunks {
    Index shape;                  // of the image
    std::array<Sizes, 3> bounds;  // where chunks begin, and where the last one ends

    Index grid() const;
    Box box(const Index& number) const;
};

using Progress = std::function<void(std::int64_t done, std::int64_t total)>;
// Number and logits (H, its voxels with `margin` planes and rows before them) of a chunk that is finished.
using Receiver = std::function<void(const Index& number, Array4<Half> logits)>;

// What a way needs to know of the model.
struct Tiles {
    std::int64_t channels, heads;
    Sizes patch_size;
    std::vector<int> mirror_axes;  // spatial axes counted from 0
};

// Logits of tiles of one image by one network, the mean over mirrors.
class TileLogits {
public:
    virtual ~TileLogits() = default;
    // Of kMaxBatch tiles at most that begin at `origins`, which may lie before the image, zeros around it. Head h of
    // tile n is volume n * heads + h. Valid until the next call. Throws BackendError.
    virtual Volumes<const float> of(const std::vector<Index>& origins, const Index& tile) = 0;
    // Of a part of the image as an image of its own.
    virtual std::unique_ptr<TileLogits> within(const ImagePart& part) const = 0;
};

struct Run {
    TileLogits& tiles;
    Arithmetic& arithmetic;
    Progress progress;
};

// One image in tiles: first its chunks, then the run.
class Pass {
public:
    virtual ~Pass() = default;
    virtual const Chunks& chunks() const = 0;
    // Throws BackendError when the logits leave the range of float16.
    virtual void run(const Run& run, std::int64_t margin, const Receiver& receive) = 0;
};

class Way {
public:
    virtual ~Way() = default;
    // Throws SpecError before anything is computed. `whole`: one chunk.
    virtual std::unique_ptr<Pass> begin(const Index& shape, bool whole) const = 0;
    // What of a 3d image to predict by itself for the voxels of a box. It may reach into the zeros around the image.
    virtual ImagePart crop(const Index& shape, const Box& box) const = 0;
    // The same with smaller tiles, for an image of that shape; none where they are the smallest already.
    virtual std::unique_ptr<Way> smaller(const Index& shape) const = 0;
    virtual std::string describe() const = 0;  // members of a JSON object
};

std::unique_ptr<Way> sliding_window(const Tiles& tiles, double step_size, bool use_gaussian);

struct OnePassSettings {
    std::int64_t passes = 1;
    std::int64_t memory_limit = 0;  // 0: DEFAULT_MEMORY_LIMIT, or what the smallest tile takes
    double overhead = 1;
    Sizes largest_tile;  // empty: any
};

// Throws SpecError where no image at all could be predicted.
std::unique_ptr<Way> one_pass(const Tiles& tiles, const OnePass& rules, const OnePassSettings& settings);

// Bytes of `4G`, `800M` or a number of bytes. Throws SpecError.
std::int64_t parse_memory(const std::string& text);

// What `attempt` makes with a way, or with smaller tiles, each half of those before, as long as a network finds no
// memory for them.
template <class Attempt>
auto in_memory(const Way& way, const Index& shape, const Attempt& attempt) -> decltype(attempt(way)) {
    std::unique_ptr<Way> smaller;
    while (true) {
        const Way& now = smaller ? *smaller : way;
        try {
            return attempt(now);
        } catch (const NoMemoryError&) {
            std::unique_ptr<Way> next = now.smaller(shape);
            if (!next) throw;
            smaller = std::move(next);
        }
    }
}

// The logits of one network in one piece
Array4<Half> one_piece(const Way& way, const Index& shape, const Run& run);

// The subsets of the mirrored axes in the order of their sums: by their number of axes, then as listed
std::vector<std::vector<int>> subsets(const std::vector<int>& axes);

// Of an image in the memory of the CPU.
class HostTiles : public TileLogits {
public:
    HostTiles(const Network& network, const Tiles& model, const Volumes<const float>& image, int threads)
        : network_(network), model_(model), image_(image), threads_(threads) {}

    Volumes<const float> of(const std::vector<Index>& origins, const Index& tile) override;
    std::unique_ptr<TileLogits> within(const ImagePart& part) const override;

private:
    const Network& network_;
    const Tiles& model_;
    Volumes<const float> image_;
    int threads_;
    Array4<float> own_;  // which `image_` is, where it is no one else's
    Array4<float> batch_, logits_;
    KeptLogits kept_;  // of the tiles before, in the place of `logits_`
};

constexpr std::int64_t kBatchVoxels = 1 << 17, kMaxBatch = 16;  // of small (2d) patches
}  // namespace fastnnunet::engine
