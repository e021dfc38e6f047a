#include "core/label.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "core/rows.hpp"
#include "core/threads.hpp"

namespace fastnnunet {
namespace {

// A block of output voxels (whole rows) is finished for all heads before the next: what it needs stays in the cache.
constexpr std::int64_t kBlockPlanes = 8;
constexpr std::int64_t kBlockRows = 16;

// Two neighbours and their weights per output, in float32
struct TwoTaps {
    std::vector<std::int32_t> low;
    std::vector<float> weight_low, weight_high;
    bool is_selection;

    explicit TwoTaps(const AxisOperator& op) : is_selection(op.is_selection()) {
        if (!op.is_local()) throw std::invalid_argument("logits are labelled on the way only with order 0 or 1");
        for (std::int64_t i = 0; i < op.size_out(); ++i) {
            const double* weight = op.weights() + i * op.taps();
            low.push_back(op.first()[i]);
            weight_low.push_back(static_cast<float>(weight[0]));
            weight_high.push_back(is_selection ? 0 : static_cast<float>(weight[1]));
        }
    }

    std::int64_t high(std::int64_t i) const { return is_selection ? low[i] : low[i] + 1; }
};

struct Scratch {
    std::vector<float> row;          // one input row and one value more
    std::vector<float> wide;         // (input planes, input rows, output width)
    std::vector<float> between;      // (input rows, output width) of one output plane
    std::vector<float> best;         // of a block
    std::vector<std::uint32_t> label;

    template <class T>
    static T* at_least(std::vector<T>& buffer, std::int64_t size) {
        if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(size);
        return buffer.data();
    }
};

struct Block {
    std::int64_t first_plane, planes, first_row, rows;  // of the output
};

// Calls emit(plane in block, row in block, blend) for every output row of a block of one head.
template <class Logit>
class BlockInterpolator {
public:
    // `first_in`: z and y of the first input row there is
    BlockInterpolator(const LogitPlan& plan, const std::array<std::int64_t, 2>& first_in)
        : z_(plan.operators[0]), y_(plan.operators[1]), x_(plan.operators[2]), first_in_(first_in),
          to_half_(plan.to_half) {}

    const TwoTaps& z() const { return z_; }
    const TwoTaps& y() const { return y_; }

    template <class Emit>
    void operator()(const Volume<const Logit>& in, const Block& block, Scratch& scratch, const Emit& emit) const {
        const std::int64_t width = static_cast<std::int64_t>(x_.low.size());
        const std::int64_t first_plane = z_.low[block.first_plane];
        const std::int64_t planes = z_.high(block.first_plane + block.planes - 1) + 1 - first_plane;
        const std::int64_t first_row = y_.low[block.first_row];
        const std::int64_t rows = y_.high(block.first_row + block.rows - 1) + 1 - first_row;
        float* wide = Scratch::at_least(scratch.wide, planes * rows * width);
        float* between = Scratch::at_least(scratch.between, rows * width);
        widen(in, first_plane, planes, first_row, rows, scratch, wide);
        for (std::int64_t plane = 0; plane < block.planes; ++plane) {
            const std::int64_t z = block.first_plane + plane;
            const float* low = wide + (z_.low[z] - first_plane) * rows * width;
            const float* blended = low;
            if (z_.weight_high[z] != 0) {
                blend_row({low, low + rows * width, z_.weight_low[z], z_.weight_high[z], false}, between, rows * width);
                blended = between;
            }
            for (std::int64_t row = 0; row < block.rows; ++row) {
                const std::int64_t y = block.first_row + row;
                const float* a = blended + (y_.low[y] - first_row) * width;
                const float* b = blended + (y_.high(y) - first_row) * width;
                emit(plane, row, Blend{a, b, y_.weight_low[y], y_.weight_high[y], to_half_});
            }
        }
    }

private:
    // Input rows interpolated along x only
    void widen(const Volume<const Logit>& in, std::int64_t first_plane, std::int64_t planes, std::int64_t first_row,
               std::int64_t rows, Scratch& scratch, float* wide) const {
        const std::int64_t size_in = in.shape[2], width = static_cast<std::int64_t>(x_.low.size());
        float* values = Scratch::at_least(scratch.row, size_in + 1);
        values[size_in] = 0;
        for (std::int64_t plane = 0; plane < planes; ++plane) {
            for (std::int64_t row = 0; row < rows; ++row, wide += width) {
                const Logit* from = in.row(first_plane + plane - first_in_[0], first_row + row - first_in_[1]);
                if (size_in == width) {  // the identity
                    read_row(from, wide, width);
                } else {
                    read_row(from, values, size_in);
                    interpolate_row(values, x_.low.data(), x_.weight_low.data(), x_.weight_high.data(), wide, width);
                }
            }
        }
    }

    TwoTaps z_, y_, x_;
    std::array<std::int64_t, 2> first_in_;
    bool to_half_;
};

// Half open
struct Range {
    std::int64_t start, stop;

    std::int64_t size() const { return stop - start; }
    bool lies_in(const Range& other) const { return start >= other.start && stop <= other.stop; }
};

void require_fit(bool fits) {
    if (!fits) throw std::invalid_argument("labelling: arrays do not have the shapes of the operators");
}

// The outputs of an axis, which lie in `out`, need only inputs in `in`.
void check_range(const Range& in, const Range& out, const AxisOperator& op, const TwoTaps& taps) {
    require_fit(in.lies_in({0, op.size_in()}) && out.lies_in({0, op.size_out()}));
    if (out.size() > 0 && !Range{taps.low[out.start], taps.high(out.stop - 1) + 1}.lies_in(in)) {
        throw std::invalid_argument("labelling: the part lacks inputs that its outputs need");
    }
}

// Blocks of an output; planes that are copies of one input plane (`z` selects) are one plane.
std::vector<Block> make_blocks(const std::vector<std::int64_t>& plane_starts, std::int64_t end, bool single,
                               const Range& rows) {
    std::vector<Block> blocks;
    const std::size_t step = single ? 1 : static_cast<std::size_t>(kBlockPlanes);
    for (std::size_t i = 0; i < plane_starts.size(); i += step) {
        const std::int64_t stop = i + step < plane_starts.size() ? plane_starts[i + step] : end;
        const std::int64_t planes = single ? 1 : stop - plane_starts[i];
        for (std::int64_t row = rows.start; row < rows.stop; row += kBlockRows) {
            blocks.push_back({plane_starts[i], planes, row, std::min(kBlockRows, rows.stop - row)});
        }
    }
    return blocks;
}

std::vector<std::int64_t> distinct_planes(const TwoTaps& z, const Range& planes) {
    std::vector<std::int64_t> starts;
    for (std::int64_t i = planes.start; i < planes.stop; ++i) {
        if (i == planes.start || !z.is_selection || z.low[i] != z.low[i - 1]) starts.push_back(i);
    }
    return starts;
}

// Calls change(row of values, row of labels as uint32, its number) for every row and stores the labels.
template <class Label, class Change>
void change_labels(const Volume<const float>& values, const Volume<Label>& labels, int threads, const Change& change) {
    parallel_for<Scratch>(values.rows(), threads, [&](std::int64_t number, Scratch& scratch) {
        const std::int64_t width = values.shape[2];
        std::uint32_t* label = Scratch::at_least(scratch.label, width);
        Label* to = labels.row(number);
        for (std::int64_t x = 0; x < width; ++x) label[x] = to[x];
        change(values.row(number), label, number);
        for (std::int64_t x = 0; x < width; ++x) to[x] = static_cast<Label>(label[x]);
    });
}

}  // namespace

template <class Logit, class Label>
void label_logits(const Volumes<const Logit>& logits, const Volume<Label>& labels, const LogitPlan& plan,
                  const Part& part, const std::optional<std::vector<std::uint32_t>>& regions, int threads) {
    if (regions && static_cast<std::int64_t>(regions->size()) != logits.count) {
        throw std::invalid_argument("labelling: as many region labels are needed as there are heads");
    }
    const BlockInterpolator<Logit> interpolate(plan, part.first_in);
    const TwoTaps& z_taps = interpolate.z();
    const std::int64_t width = labels.shape[2];
    const std::int64_t first_plane = part.first_out[0], first_row = part.first_out[1];
    const auto range = [](std::int64_t first, std::int64_t size) { return Range{first, first + size}; };
    const Range planes = range(first_plane, labels.shape[0]), rows = range(first_row, labels.shape[1]);
    check_range(range(part.first_in[0], logits.shape[0]), planes, plan.operators[0], z_taps);
    check_range(range(part.first_in[1], logits.shape[1]), rows, plan.operators[1], interpolate.y());
    require_fit(logits.shape[2] == plan.operators[2].size_in() && width == plan.operators[2].size_out());
    const std::vector<Block> blocks =
        make_blocks(distinct_planes(z_taps, planes), planes.stop, z_taps.is_selection, rows);
    parallel_for<Scratch>(blocks.size(), threads, [&](std::int64_t number, Scratch& scratch) {
        const Block& block = blocks[number];
        const std::int64_t size = block.planes * block.rows * width;
        std::uint32_t* label = Scratch::at_least(scratch.label, size);
        float* best = Scratch::at_least(scratch.best, size);
        std::fill(label, label + size, 0u);
        std::fill(best, best + size, -std::numeric_limits<float>::infinity());
        for (std::int64_t head = 0; head < logits.count; ++head) {
            interpolate(logits[head], block, scratch, [&](std::int64_t plane, std::int64_t row, const Blend& blend) {
                const std::int64_t at = (plane * block.rows + row) * width;
                if (regions) {
                    paint_row(blend, (*regions)[head], label + at, width);
                } else {
                    argmax_row(blend, static_cast<std::uint32_t>(head), best + at, label + at, width);
                }
            });
        }
        for (std::int64_t plane = 0; plane < block.planes; ++plane) {
            const std::int64_t z = block.first_plane + plane;
            // the copies of a selected plane, too
            for (std::int64_t same = z; same < planes.stop; ++same) {
                if (same > z && !(z_taps.is_selection && z_taps.low[same] == z_taps.low[z])) break;
                for (std::int64_t row = 0; row < block.rows; ++row) {
                    const std::uint32_t* from = label + (plane * block.rows + row) * width;
                    Label* to = labels.row(same - first_plane, block.first_row - first_row + row);
                    for (std::int64_t x = 0; x < width; ++x) to[x] = static_cast<Label>(from[x]);
                }
            }
        }
    });
}

template <class Logit>
void resample_planes(const Volumes<const Logit>& logits, const Volumes<float>& out, const LogitPlan& plan,
                     std::int64_t first_plane, int threads) {
    for (int axis = 0; axis < 3; ++axis) {
        const AxisOperator& op = plan.operators[axis];
        require_fit(logits.shape[axis] == op.size_in() && (axis == 0 || out.shape[axis] == op.size_out()));
    }
    const std::int64_t end = first_plane + out.shape[0];
    if (first_plane < 0 || end > plan.operators[0].size_out() || out.count != logits.count) {
        throw std::invalid_argument("resampling of planes: there are not that many planes or heads");
    }
    const BlockInterpolator<Logit> interpolate(plan, {0, 0});
    std::vector<std::int64_t> planes(out.shape[0]);
    for (std::int64_t i = 0; i < out.shape[0]; ++i) planes[i] = first_plane + i;
    const std::vector<Block> blocks = make_blocks(planes, end, false, {0, out.shape[1]});
    const std::int64_t per_head = static_cast<std::int64_t>(blocks.size());
    parallel_for<Scratch>(per_head * logits.count, threads, [&](std::int64_t number, Scratch& scratch) {
        const std::int64_t head = number / per_head;
        const Block& block = blocks[number % per_head];
        interpolate(logits[head], block, scratch, [&](std::int64_t plane, std::int64_t row, const Blend& blend) {
            float* to = out[head].row(block.first_plane - first_plane + plane, block.first_row + row);
            blend_row(blend, to, out.shape[2]);
        });
    });
}

template <class Label>
void label_head(const Volume<const float>& values, bool to_half, std::uint32_t head, const Volume<float>& best,
                const Volume<Label>& labels, int threads) {
    change_labels(values, labels, threads, [&](const float* row, std::uint32_t* label, std::int64_t number) {
        argmax_row({row, row, 1, 0, to_half}, head, best.row(number), label, values.shape[2]);
    });
}

template <class Label>
void paint_head(const Volume<const float>& values, bool to_half, std::uint32_t painted, const Volume<Label>& labels,
                int threads) {
    change_labels(values, labels, threads, [&](const float* row, std::uint32_t* label, std::int64_t) {
        paint_row({row, row, 1, 0, to_half}, painted, label, values.shape[2]);
    });
}

#define FASTNNUNET_INSTANTIATE(Logit, Label)                                                                     \
    template void label_logits(const Volumes<const Logit>&, const Volume<Label>&, const LogitPlan&, const Part&, \
                               const std::optional<std::vector<std::uint32_t>>&, int);
FASTNNUNET_INSTANTIATE(float, std::uint8_t)
FASTNNUNET_INSTANTIATE(float, std::uint16_t)
FASTNNUNET_INSTANTIATE(Half, std::uint8_t)
FASTNNUNET_INSTANTIATE(Half, std::uint16_t)
#undef FASTNNUNET_INSTANTIATE

template void resample_planes(const Volumes<const float>&, const Volumes<float>&, const LogitPlan&, std::int64_t, int);
template void resample_planes(const Volumes<const Half>&, const Volumes<float>&, const LogitPlan&, std::int64_t, int);

#define FASTNNUNET_INSTANTIATE(Label)                                                                          \
    template void label_head(const Volume<const float>&, bool, std::uint32_t, const Volume<float>&,            \
                             const Volume<Label>&, int);                                                       \
    template void paint_head(const Volume<const float>&, bool, std::uint32_t, const Volume<Label>&, int);
FASTNNUNET_INSTANTIATE(std::uint8_t)
FASTNNUNET_INSTANTIATE(std::uint16_t)
#undef FASTNNUNET_INSTANTIATE

}  // namespace fastnnunet
