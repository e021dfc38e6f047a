#include "device/stages.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fastnnunet::engine {
namespace {

const Gpu& gpu_of(const std::vector<std::unique_ptr<Network>>& networks, const std::string& plugins) {
    return gpu_with_kernels(*networks.front()->gpu(), plugins);
}

}  // namespace

DeviceStages::DeviceStages(const Bundle& bundle, const Tiles& model, const LabelRule& rule,
                           const std::vector<std::unique_ptr<Network>>& networks, const std::string& plugins)
    : bundle_(bundle), model_(model), rule_(rule), gpu_(gpu_of(networks, plugins)) {
    for (const auto& network : networks) {
        networks_.push_back(std::make_unique<DeviceNetwork>(gpu_, *network, model));
    }
}

bool DeviceStages::can_preprocess() const {
    const auto& masked = bundle_.use_mask_for_norm;
    return bundle_.previous_labels.empty() && std::find(masked.begin(), masked.end(), true) == masked.end();
}

Case DeviceStages::preprocess(const ImageArray& image, const Preprocessing& how) const {
    check_image(image, bundle_);
    check_size(image.voxels.count, image.voxels.shape);
    const auto stream = std::make_shared<const Stream>(gpu_);
    const Array4<float> there = stream->upload(image.voxels.read());
    const Box crop = nonzero_box(*stream, there.read());
    const Volumes<float> channels = part(there.view(), crop);
    for (std::int64_t channel = 0; channel < channels.count; ++channel) {
        normalize(*stream, channels[channel], bundle_.normalization_schemes[static_cast<std::size_t>(channel)],
                  bundle_.intensity_properties.find(std::to_string(channel)));
    }
    auto [made, plan, shape] = plan_case(image, crop, how);
    check_size(channels.count, shape);
    made.stream = stream;
    const bool is_as_read =
        bundle_.transpose_forward == std::array<int, 3>{0, 1, 2} && made.cropped_shape() == image.voxels.shape;
    if (!plan && is_as_read) {
        made.data = there;
        return made;
    }
    made.data = stream->array<float>(channels.count, shape);
    for (std::int64_t channel = 0; channel < channels.count; ++channel) {
        resample(*stream, device_volume(channels[channel]).transposed(bundle_.transpose_forward), plan,
                 device_volume(made.data.view()[channel]));
    }
    return made;
}

Case DeviceStages::upload(Case from) const {
    check_size(from.data.count, from.data.shape);
    const auto stream = std::make_shared<const Stream>(gpu_);
    from.data = stream->upload(from.data.read());
    from.stream = stream;
    return from;
}

Array4<float> DeviceStages::fetch(const Case& from) const {
    Array4<float> made(from.data.count, from.data.shape);
    from.stream->download(made.values.get(), from.data.values.get(),
                          sizeof(float) * static_cast<std::size_t>(made.size()));
    return made;
}

FetchLabels DeviceStages::infer(const Case& from, const Way& way, const std::optional<ResamplePlan>& plan,
                                const Progress& progress, std::int64_t stream_bytes) const {
    const Stream& stream = *from.stream;
    DeviceArithmetic arithmetic(stream, stream.new_limits(2));
    // in the axes of the image as read: labels are put into it by strides
    const std::int64_t voxels = voxels_of(from.image_shape), bytes = rule_.is_wide ? 2 : 1;
    const DeviceMemory<std::uint8_t> whole = stream.memory<std::uint8_t>(voxels * bytes);
    stream.clear(whole.get(), static_cast<std::size_t>(voxels * bytes));
    const Index in_image{from.image_shape[1] * from.image_shape[2], from.image_shape[2], 1};
    DeviceLabelMap labels{{whole.get(), {}, bytes}, from.cropped_shape()};
    std::int64_t first = 0;
    for (int axis = 0; axis < 3; ++axis) {
        labels.map.stride[axis] = in_image[bundle_.transpose_forward[axis]];
        first += from.crop.start[axis] * labels.map.stride[axis];
    }
    labels.map.data = whole.get() + first * bytes;
    const bool is_local = !plan || plan->is_local();
    if (networks_.size() == 1 && is_local && 2 * rule_.heads * voxels_of(from.data.shape) > stream_bytes) {
        stream_labels(from, way, plan, progress, arithmetic, labels);
    } else {
        const Array4<Half> all = logits(from, way, progress, arithmetic);
        DeviceLabels(stream, arithmetic, plan, rule_, labels).label_whole(all.read());
    }
    return [whole, of = from.stream, limits = arithmetic.limits(), shape = from.image_shape,
            is_wide = rule_.is_wide]() -> LabelMap {
        LabelMap map;
        if (is_wide) {
            map = Array3<std::uint16_t>(shape);
        } else {
            map = Array3<std::uint8_t>(shape);
        }
        std::visit([&](auto& array) {
            of->download(array.values.get(), whole.get(),
                         sizeof array.values[0] * static_cast<std::size_t>(array.size()));
        }, map);
        DeviceArithmetic(*of, limits).check();
        return map;
    };
}

// The sum of the folds rounds after each, so their order counts.
Array4<Half> DeviceStages::logits(const Case& from, const Way& way, const Progress& progress,
                                  DeviceArithmetic& of_case) const {
    const Stream& own = *from.stream;
    const auto folds = static_cast<std::int64_t>(networks_.size());
    Array4<Half> total;
    for (std::int64_t number = 0; number < folds; ++number) {
        Progress share;
        if (progress) {
            share = [&, number](std::int64_t done, std::int64_t all) { progress(number * all + done, folds * all); };
        }
        DeviceTiles tiles(*networks_[static_cast<std::size_t>(number)], model_, own, from.data.read());
        DeviceArithmetic arithmetic(tiles.stream(), of_case.limits());
        const std::unique_ptr<Pass> pass = way.begin(from.data.shape, number == 0);
        pass->run({tiles, arithmetic, share}, 0, [&](const Index& chunk, Array4<Half> logits) {
            own.follow(tiles.stream());
            own.take(logits.values);
            if (number == 0) {
                total = std::move(logits);
            } else {
                of_case.add_halves(logits.read(), part(total.view(), pass->chunks().box(chunk)));
            }
        });
        tiles.close();
    }
    if (folds > 1) of_case.divide(total.view(), folds, "the sum of the folds' logits");
    return total;
}

Array4<Half> DeviceStages::logits(const Case& from, const Way& way, const Progress& progress) const {
    DeviceArithmetic arithmetic(*from.stream, from.stream->new_limits(2));
    const Array4<Half> there = logits(from, way, progress, arithmetic);
    Array4<Half> made(there.count, there.shape);
    from.stream->download(made.values.get(), there.values.get(), sizeof(Half) * static_cast<std::size_t>(made.size()));
    arithmetic.check();
    return made;
}

void DeviceStages::stream_labels(const Case& from, const Way& way, const std::optional<ResamplePlan>& plan,
                                 const Progress& progress, DeviceArithmetic& of_case,
                                 const DeviceLabelMap& labels) const {
    const Stream& own = *from.stream;
    DeviceTiles tiles(*networks_.front(), model_, own, from.data.read());
    DeviceArithmetic arithmetic(tiles.stream(), of_case.limits());
    const std::unique_ptr<Pass> pass = way.begin(from.data.shape, false);
    DeviceLabels written(own, of_case, plan, rule_, labels);
    LabelStream stream(pass->chunks(), plan, written);
    pass->run({tiles, arithmetic, progress}, LabelStream::kMargin, [&](const Index& number, Array4<Half> logits) {
        own.follow(tiles.stream());
        own.take(logits.values);
        stream.add(number, std::move(logits));
    });
    tiles.close();
}

std::unique_ptr<DeviceStages> device_stages(const Bundle& bundle, const Tiles& model, const LabelRule& rule,
                                            const std::vector<std::unique_ptr<Network>>& networks,
                                            const std::string& plugins, std::string& reason) {
    if (!networks.front()->gpu()) return nullptr;
    const char* wanted = std::getenv("FASTNNUNET_STAGES");
    if (wanted != nullptr && std::strcmp(wanted, "cpu") == 0) return nullptr;
    if (bundle.batch_size != 0) {
        reason = "the model takes batches of one size alone";
        return nullptr;
    }
    try {
        return std::make_unique<DeviceStages>(bundle, model, rule, networks, plugins);
    } catch (const BackendError& e) {
        reason = e.what();
        return nullptr;
    }
}

}  // namespace fastnnunet::engine
