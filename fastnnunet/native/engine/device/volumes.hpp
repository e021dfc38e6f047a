// What is done to volumes on a GPU before and after the network: crop, intensities, resampling, labels; by the core's
// operations in the core's order. As fastnnunet/engines/cuda/intensity.py, resample.py and label.py.
#pragma once

#include "device/gpu.hpp"
#include "predict/labels.hpp"

namespace fastnnunet::engine {

// A volume on a GPU whose neighbours may lie apart along every axis; strides in elements.
struct DeviceVolume {
    void* data;
    cuda::Type type;
    Index shape, stride;

    DeviceVolume transposed(const std::array<int, 3>& axes) const {
        return {data, type, {shape[axes[0]], shape[axes[1]], shape[axes[2]]},
                {stride[axes[0]], stride[axes[1]], stride[axes[2]]}};
    }
};

inline cuda::Type type_of(const float*) { return cuda::kFloat; }
inline cuda::Type type_of(const double*) { return cuda::kDouble; }
inline cuda::Type type_of(const Half*) { return cuda::kHalf; }

template <class T>
DeviceVolume device_volume(const Volume<T>& of) {
    return {const_cast<std::remove_const_t<T>*>(of.data), type_of(of.data), of.shape, {of.stride[0], of.stride[1], 1}};
}

// Around what is not zero in any channel; the whole image where nothing is. Waits: the box decides all shapes after it.
Box nonzero_box(const Stream& stream, const Volumes<const float>& contiguous);

// nnU-Net's normalisation in place, by one of the schemes without a mask. `intensity`: the statistics of CT. Waits for
// RGBTo01Normalization, of which it throws BadImage.
void normalize(const Stream& stream, const Volume<float>& channel, const std::string& scheme, const Json* intensity);

// Lowest and highest of a float32 or float16 volume, or of each plane across an axis
DeviceMemory<cuda::Limits> limits_of(const Stream& stream, const DeviceVolume& volume,
                                     std::optional<int> plane_axis = std::nullopt);

// Into a float32 volume of the plan's shape; no plan: a copy.
void resample(const Stream& stream, const DeviceVolume& in, const std::optional<ResamplePlan>& plan,
              const DeviceVolume& out);

// Where labels go: the crop of an image, in the axes of the model, by strides; uint8 or uint16.
struct DeviceLabelMap {
    cuda::LabelMap map;
    Index shape;
};

class DeviceLabels : public LabelSink {
public:
    // `plan`: of a whole image any; in parts one that is local, or none.
    DeviceLabels(const Stream& stream, Arithmetic& arithmetic, std::optional<ResamplePlan> plan, const LabelRule& rule,
                 const DeviceLabelMap& labels);

    const Index& shape() const override { return labels_.shape; }
    Arithmetic& arithmetic() override { return arithmetic_; }
    void label(const Volumes<const Half>& logits, const Index& in, const Part& part, const Index& out) override;
    void label_whole(const Volumes<const Half>& logits);

private:
    const Stream& stream_;
    Arithmetic& arithmetic_;
    std::optional<ResamplePlan> plan_;
    const LabelRule& rule_;
    DeviceLabelMap labels_;
    DeviceMemory<std::int32_t> regions_;
};

}  // namespace fastnnunet::engine
