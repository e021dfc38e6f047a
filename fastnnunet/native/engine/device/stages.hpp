// Preprocessing, window and labels of a case on the GPU of its networks. As fastnnunet/runtime/device/stages.py.
//
// A case has a stream of its own, on which it is uploaded, preprocessed, labelled and fetched; tiles go through the
// network on the network's. So while the network is at one case the next one is on its way in, and chunks that are
// finished are labelled beside it. Events order what one stream makes and another reads.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "device/volumes.hpp"
#include "device/window.hpp"

namespace fastnnunet::engine {

// Waits for the labels of a case and brings them from the GPU, in the axes of the image. Throws BackendError where
// logits left the range of float16, or the GPU failed.
using FetchLabels = std::function<LabelMap()>;

class DeviceStages {
public:
    // Throws BackendError where the kernels cannot be had for the GPU of the networks, which is the same for all.
    DeviceStages(const Bundle& bundle, const Tiles& model, const LabelRule& rule,
                 const std::vector<std::unique_ptr<Network>>& networks, const std::string& plugins);

    // Not where a mask with its holes filled is needed, nor a previous segmentation.
    bool can_preprocess() const;
    // As `preprocess` of the CPU. Throws BadImage, BackendError.
    Case preprocess(const ImageArray& image, const Preprocessing& how) const;
    // A case that was preprocessed on the CPU.
    Case upload(Case from) const;
    Array4<float> fetch(const Case& from) const;  // its data

    // Labels, chunk by chunk where there is one network and its logits are of more than `stream_bytes`. Throws
    // BackendError, NoMemoryError where smaller tiles may do.
    FetchLabels infer(const Case& from, const Way& way, const std::optional<ResamplePlan>& plan,
                      const Progress& progress, std::int64_t stream_bytes) const;
    // Logits for whoever needs them on the CPU. Throws BackendError.
    Array4<Half> logits(const Case& from, const Way& way, const Progress& progress) const;

private:
    Array4<Half> logits(const Case& from, const Way& way, const Progress& progress, DeviceArithmetic& of_case) const;
    void stream_labels(const Case& from, const Way& way, const std::optional<ResamplePlan>& plan,
                       const Progress& progress, DeviceArithmetic& of_case, const DeviceLabelMap& labels) const;

    const Bundle& bundle_;
    const Tiles& model_;
    const LabelRule& rule_;
    const Gpu& gpu_;
    std::vector<std::unique_ptr<DeviceNetwork>> networks_;
};

// The stages on the GPU of the networks. None where they compute on the CPU, where $FASTNNUNET_STAGES is `cpu`, or for
// the `reason` that is set then.
std::unique_ptr<DeviceStages> device_stages(const Bundle& bundle, const Tiles& model, const LabelRule& rule,
                                            const std::vector<std::unique_ptr<Network>>& networks,
                                            const std::string& plugins, std::string& reason);

}  // namespace fastnnunet::engine
