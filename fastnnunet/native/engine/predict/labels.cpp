#include "predict/labels.hpp"

#include <limits>
#include <set>

#include "core/half.hpp"
#include "core/probabilities.hpp"
#include "core/threads.hpp"
#include "error.hpp"

namespace fastnnunet::engine {
namespace {

AxisOperators operators(const std::optional<ResamplePlan>& plan, const Index& in, const Index& out) {
    return {operator_along(0, plan, in, out), operator_along(1, plan, in, out), operator_along(2, plan, in, out)};
}

// Of all or of a part of the image. `plan`: none or one that is local.
void label_locally(const Volumes<const Half>& logits, const std::optional<ResamplePlan>& plan, const LabelRule& rule,
                   const LabelView& labels, const Index& shape_in, const Index& shape_out, const Part& part,
                   int threads) {
    const LogitPlan how{operators(plan, shape_in, shape_out), plan && plan->keeps_type()};
    threads = pass_threads(threads, logits.count * voxels_of(logits.shape));
    std::visit([&](const auto& view) { label_logits(logits, view, how, part, rule.regions, threads); }, labels);
}

std::int64_t to_label(const Json& value) {
    return value.is(Json::Kind::text) ? std::stol(value.text()) : value.integer().value_or(0);
}

}  // namespace

LabelRule label_rule(const Bundle& bundle) {
    bool has_regions = false;
    std::set<std::int64_t> labels;
    for (const auto& [name, value] : bundle.labels.members()) {
        has_regions = has_regions || value.items().size() > 1;
        if (name == "ignore") continue;
        if (!value.is(Json::Kind::list)) labels.insert(to_label(value));
        for (const Json& item : value.items()) labels.insert(to_label(item));
    }
    LabelRule rule{bundle.num_heads, std::nullopt, false};
    const std::string heads = std::to_string(bundle.num_heads);
    std::int64_t largest = 0;
    if (has_regions) {
        const auto& order = bundle.regions_class_order;
        if (!order || static_cast<std::int64_t>(order->size()) != bundle.num_heads) {
            std::string text = order ? "(" : "None";
            for (std::size_t i = 0; order && i < order->size(); ++i)
                text += (i ? ", " : "") + std::to_string((*order)[i]);
            if (order) text += order->size() == 1 ? ",)" : ")";
            throw SpecError("the model has regions and " + heads + " heads but regions_class_order is " + text +
                            ", expected one label per head; export the bundle again");
        }
        rule.regions.emplace(order->begin(), order->end());
        largest = *std::max_element(order->begin(), order->end());
    } else if (static_cast<std::int64_t>(labels.size()) != bundle.num_heads) {
        throw SpecError("the model has " + heads + " heads but " + std::to_string(labels.size()) +
                        " labels; export the bundle again");
    }
    labels.erase(0);
    rule.is_wide = labels.size() >= 255 || largest > 255;
    return rule;
}

LabelMap new_labels(const LabelRule& rule, const Index& shape) {
    LabelMap map;
    if (rule.is_wide) {
        map = Array3<std::uint16_t>(shape);
    } else {
        map = Array3<std::uint8_t>(shape);
    }
    std::visit([](auto& array) { array.fill(0); }, map);
    return map;
}

LabelView view_of(LabelMap& map, const Box& box) {
    return std::visit([&](auto& array) -> LabelView { return part(array.view(), box); }, map);
}

void label_whole(const Volumes<const Half>& logits, const std::optional<ResamplePlan>& plan, const LabelRule& rule,
                 const LabelView& labels, int threads) {
    const Index shape_out = std::visit([](const auto& view) { return view.shape; }, labels);
    if (!plan || plan->is_local()) {
        return label_locally(logits, plan, rule, labels, logits.shape, shape_out, {}, threads);
    }
    Array3<float> best(shape_out), values(shape_out);
    best.fill(-std::numeric_limits<float>::infinity());
    const int few = pass_threads(threads, values.size());
    for (std::int64_t head = 0; head < logits.count; ++head) {
        resample(logits[head], values.view(), *plan, pass_threads(threads, values.size(), 8));
        std::visit([&](const auto& view) {
            if (rule.regions) {
                paint_head(values.read(), plan->keeps_type(), (*rule.regions)[head], view, few);
            } else {
                label_head(values.read(), plan->keeps_type(), static_cast<std::uint32_t>(head), best.view(), view, few);
            }
        }, labels);
    }
}

Array4<float> new_probabilities(const LabelRule& rule, const Index& shape) {
    Array4<float> made(rule.heads, shape);
    std::fill(made.values.get(), made.values.get() + made.size(), 0.0f);
    if (!rule.regions) std::fill(made.values.get(), made.values.get() + voxels_of(shape), 1.0f);
    return made;
}

void label_probabilities(const Volumes<const Half>& logits, const std::optional<ResamplePlan>& plan,
                         const LabelRule& rule, const LabelView& labels, const Volumes<float>& probabilities,
                         int threads) {
    const Index& shape = probabilities.shape;
    const int few = pass_threads(threads, probabilities.count * voxels_of(shape));
    if (!plan || plan->is_local()) {
        const LogitPlan how{operators(plan, logits.shape, shape), plan && plan->keeps_type()};
        resample_planes(logits, probabilities, how, 0, few);
    } else {
        for (std::int64_t head = 0; head < logits.count; ++head) {
            resample(logits[head], probabilities[head], *plan, pass_threads(threads, voxels_of(shape), 8));
            for (std::int64_t row = 0; plan->keeps_type() && row < probabilities[head].rows(); ++row) {
                float* values = probabilities[head].row(row);
                std::transform(values, values + shape[2], values, [](float value) { return round_to_half(value); });
            }
        }
    }
    if (!rule.regions) softmax_heads(probabilities, few);
    const LogitPlan as_it_is{operators(std::nullopt, shape, shape), false};
    std::visit([&](const auto& view) {
        label_logits(readable(probabilities), view, as_it_is, Part{}, rule.regions, few);
    }, labels);
    if (rule.regions) sigmoid_heads(probabilities, few);
}

AxisOperator operator_along(int axis, const std::optional<ResamplePlan>& plan, const Index& in, const Index& out) {
    return {in[axis], out[axis], plan ? plan->orders[axis] : 0, plan ? plan->convention : Convention::scipy};
}

HostLabels::HostLabels(std::optional<ResamplePlan> plan, const LabelRule& rule, LabelView labels, int threads)
    : plan_(std::move(plan)), rule_(rule), labels_(std::move(labels)),
      shape_(std::visit([](const auto& view) { return view.shape; }, labels_)), threads_(threads),
      arithmetic_(threads) {}

void HostLabels::label(const Volumes<const Half>& logits, const Index& in, const Part& part, const Index& out) {
    const LabelView labels = std::visit([&](const auto& view) -> LabelView {
        auto made = view;
        made.data = view.data + part.first_out[0] * view.stride[0] + part.first_out[1] * view.stride[1];
        made.shape = out;
        return made;
    }, labels_);
    label_locally(logits, plan_, rule_, labels, in, shape_, part, threads_);
}

LabelStream::LabelStream(const Chunks& chunks, const std::optional<ResamplePlan>& plan, LabelSink& sink)
    : chunks_(chunks), sink_(sink), ready_{ready_before(0, plan), ready_before(1, plan)} {}

// For each bound: how many voxels of the target need no logit from there on.
Sizes LabelStream::ready_before(int axis, const std::optional<ResamplePlan>& plan) const {
    const AxisOperator along = operator_along(axis, plan, chunks_.shape, sink_.shape());
    Sizes last(along.first(), along.first() + along.size_out()), ready;
    for (std::int64_t& input : last) input += along.taps() - 1;
    for (const std::int64_t bound : chunks_.bounds[axis]) {
        ready.push_back(std::lower_bound(last.begin(), last.end(), bound) - last.begin());
    }
    return ready;
}

void LabelStream::add(const Index& number, Array4<Half> logits) {
    const auto [layer, band, column] = number;
    const Box box = chunks_.box(number);
    const Index grid = chunks_.grid();
    Arithmetic& arithmetic = sink_.arithmetic();
    const std::int64_t depth = logits.shape[0], height = logits.shape[1], width = logits.shape[2];
    const std::int64_t before_z = layer > 0 ? kMargin : 0,
                       before_y = band > 0 ? kMargin : 0;  // nothing before the first
    const auto plane = [&](std::int64_t z) {
        return part(logits.view(), {{z, kMargin, 0}, {z + 1, height, width}});
    };
    const auto row = [&](std::int64_t y) { return part(logits.view(), {{0, y, 0}, {depth, y + 1, width}}); };
    const Box in_layer{{0, box.start[1], 0}, {1, box.stop[1], width}};  // of a plane that is kept
    if (layer > 0) arithmetic.copy(part(planes_.at(layer - 1).read(), in_layer), plane(0));
    if (band > 0) arithmetic.copy(rows_.at(layer).read(), row(0));

    const Box within{{kMargin - before_z, kMargin - before_y, 0}, logits.shape};
    const Index out_start{ready_[0][layer], ready_[1][band], 0},
        out_stop{ready_[0][layer + 1], ready_[1][band + 1], sink_.shape()[2]};
    const Part of{{box.start[0] - before_z, box.start[1] - before_y}, {out_start[0], out_start[1]}};
    sink_.label(part(logits.read(), within), chunks_.shape, of, extent({out_start, out_stop}));

    if (layer + 1 < grid[0]) {
        if (band == 0) planes_[layer] = arithmetic.empty(logits.count, {1, chunks_.shape[1], width});
        arithmetic.copy(readable(plane(depth - 1)), part(planes_[layer].view(), in_layer));
    }
    if (band + 1 < grid[1]) {
        rows_[layer] = arithmetic.empty(logits.count, {depth, 1, width});
        arithmetic.copy(readable(row(height - 1)), rows_[layer].view());
    } else if (layer > 0) {
        planes_.erase(layer - 1);
    }
}

namespace {

// Copies a volume of internal axes into one of the image's.
template <class T>
void transpose(const T* from, const Index& shape, const std::array<int, 3>& axes, const Volume<T>& to, int threads) {
    const std::array<std::int64_t, 3> steps{shape[1] * shape[2], shape[2], 1};
    parallel_for(to.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < to.shape[1]; ++y) {
            const T* start = from + z * steps[axes[0]] + y * steps[axes[1]];
            for (std::int64_t x = 0; x < to.shape[2]; ++x) to.row(z, y)[x] = start[x * steps[axes[2]]];
        }
    });
}

Index transposed(const Index& shape, const std::array<int, 3>& axes) {
    return {shape[axes[0]], shape[axes[1]], shape[axes[2]]};
}

constexpr std::array<int, 3> kAsTheyAre{0, 1, 2};

}  // namespace

LabelMap to_image(LabelMap map, const std::array<int, 3>& transpose_backward, int threads) {
    if (transpose_backward == kAsTheyAre) return map;
    return std::visit([&](auto& from) -> LabelMap {
        std::decay_t<decltype(from)> to(transposed(from.shape, transpose_backward));
        transpose(from.values.get(), from.shape, transpose_backward, to.view(), pass_threads(threads, to.size()));
        return to;
    }, map);
}

Array4<float> to_image(Array4<float> values, const std::array<int, 3>& transpose_backward, int threads) {
    if (transpose_backward == kAsTheyAre) return values;
    Array4<float> to(values.count, transposed(values.shape, transpose_backward));
    for (std::int64_t head = 0; head < to.count; ++head) {
        transpose<float>(values.view()[head].data, values.shape, transpose_backward, to.view()[head],
                         pass_threads(threads, to.size()));
    }
    return to;
}

}  // namespace fastnnunet::engine
