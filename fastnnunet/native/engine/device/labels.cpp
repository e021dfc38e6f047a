// From logits to labels on a GPU, the resampled logits of all heads never in memory: core/label.cpp.
#include <stdexcept>

#include "device/volumes.hpp"

namespace fastnnunet::engine {
namespace {

// A part has the inputs that its labels need: a kernel would read beyond it.
void check_part(const AxisOperator& op, std::int64_t first_in, std::int64_t size_in, std::int64_t first_out,
                std::int64_t size_out) {
    if (size_out == 0) return;
    const std::int64_t low = op.first()[first_out], high = op.first()[first_out + size_out - 1] + op.taps() - 1;
    if (low < first_in || high >= first_in + size_in) {
        throw std::invalid_argument("labelling: a part without an input that it needs");
    }
}

}  // namespace

DeviceLabels::DeviceLabels(const Stream& stream, Arithmetic& arithmetic, std::optional<ResamplePlan> plan,
                           const LabelRule& rule, const DeviceLabelMap& labels)
    : stream_(stream), arithmetic_(arithmetic), plan_(std::move(plan)), rule_(rule), labels_(labels) {
    if (!rule.regions) return;
    const std::vector<std::int32_t> regions(rule.regions->begin(), rule.regions->end());
    regions_ = stream.upload(regions.data(), static_cast<std::int64_t>(regions.size()));
}

void DeviceLabels::label(const Volumes<const Half>& logits, const Index& in, const Part& part, const Index& out) {
    if (voxels_of(out) == 0) return;
    cuda::LabelParams params{};
    params.logits = logits.data;
    params.type = cuda::kHalf;
    params.stride = {logits.count_stride, logits.stride[0], logits.stride[1]};
    params.heads = logits.count;
    for (int axis = 0; axis < 3; ++axis) {
        const AxisOperator op = operator_along(axis, plan_, in, labels_.shape);
        if (axis < 2) check_part(op, part.first_in[axis], logits.shape[axis], part.first_out[axis], out[axis]);
        const Stream::Tables& tables =
            stream_.tables(op, plan_ ? plan_->orders[axis] : 0, plan_ ? plan_->convention : Convention::scipy);
        params.taps[axis] = {tables.first.get(), tables.low.get(), tables.high.get(), op.is_selection() ? 0 : 1};
        if (axis == 2) params.is_width_kept = op.is_identity();
    }
    cuda::LabelMap map = labels_.map;
    const std::int64_t offset = part.first_out[0] * map.stride[0] + part.first_out[1] * map.stride[1];
    map.data = static_cast<std::uint8_t*>(map.data) + offset * map.bytes;
    std::copy(part.first_in.begin(), part.first_in.end(), params.first_in);
    std::copy(part.first_out.begin(), part.first_out.end(), params.first_out);
    std::copy(out.begin(), out.end(), params.shape_out);
    params.rounds_to_half = plan_ && plan_->keeps_type();
    params.regions = regions_.get();
    params.labels = map;
    stream_.start_label_logits(grid_of(out[2], out[0] * out[1]), params);
}

void DeviceLabels::label_whole(const Volumes<const Half>& logits) {
    if (!plan_ || plan_->is_local()) return label(logits, logits.shape, {}, labels_.shape);
    const Index& shape = plan_->shape_out;
    const DeviceMemory<float> values = stream_.memory<float>(voxels_of(shape));
    const DeviceMemory<float> best = rule_.regions ? nullptr : stream_.memory<float>(voxels_of(shape));
    const DeviceVolume resampled{values.get(), cuda::kFloat, shape, {shape[1] * shape[2], shape[2], 1}};
    for (std::int64_t head = 0; head < logits.count; ++head) {
        resample(stream_, device_volume(logits[head]), plan_, resampled);
        cuda::HeadParams params{};
        params.values = values.get();
        params.best = best.get();
        std::copy(shape.begin(), shape.end(), params.shape);
        params.label = rule_.regions ? (*rule_.regions)[static_cast<std::size_t>(head)] : head;
        params.is_first = head == 0;
        params.rounds_to_half = plan_->keeps_type();
        params.labels = labels_.map;
        stream_.start_label_head(grid_of(shape[2], shape[0] * shape[1]), params);
    }
}

}  // namespace fastnnunet::engine
