// From logits back to the image: resample, label, uncrop, transpose back. As nnU-Net 2.8 exports a prediction.
//
// Axes: H head, Z Y X nnU-Net's internal order after transpose_forward.
#pragma once

#include <map>

#include "core/label.hpp"
#include "predict/preprocess.hpp"
#include "predict/ways.hpp"

namespace fastnnunet::engine {

// How heads become labels: the largest wins, or (regions) each head above 0.5 is painted in class order.
struct LabelRule {
    std::int64_t heads;
    std::optional<std::vector<std::uint32_t>> regions;
    bool is_wide;  // uint16, else uint8
};

// Throws SpecError when the labels do not fit the number of heads.
LabelRule label_rule(const Bundle& bundle);

// A label map of zeros
LabelMap new_labels(const LabelRule& rule, const Index& shape);

// The part of a label map in a box, in whichever type
using LabelView = std::variant<Volume<std::uint8_t>, Volume<std::uint16_t>>;
LabelView view_of(LabelMap& map, const Box& box);

// Resample and write the labels, zero before, of the whole crop.
void label_whole(const Volumes<const Half>& logits, const std::optional<ResamplePlan>& plan, const LabelRule& rule,
                 const LabelView& labels, int threads);

// The same with the probabilities of the heads (float32), from which the labels come, as in nnU-Net: softmax can make
// two float16 logits equal. `probabilities` is of the crop.
void label_probabilities(const Volumes<const Half>& logits, const std::optional<ResamplePlan>& plan,
                         const LabelRule& rule, const LabelView& labels, const Volumes<float>& probabilities,
                         int threads);

// Probabilities of an image outside what was predicted: background, or no region.
Array4<float> new_probabilities(const LabelRule& rule, const Index& shape);

// Where the labels of an image go, and what writes them.
class LabelSink {
public:
    virtual ~LabelSink() = default;
    virtual const Index& shape() const = 0;    // of the labels
    virtual Arithmetic& arithmetic() = 0;      // of the logits
    // Labels of a part, of the shape `out`, by logits that have all it needs, of an image of the shape `in`.
    virtual void label(const Volumes<const Half>& logits, const Index& in, const Part& part, const Index& out) = 0;
};

// Writes to a label map of the CPU. `plan`: none or one that is local.
class HostLabels : public LabelSink {
public:
    HostLabels(std::optional<ResamplePlan> plan, const LabelRule& rule, LabelView labels, int threads);

    const Index& shape() const override { return shape_; }
    Arithmetic& arithmetic() override { return arithmetic_; }
    void label(const Volumes<const Half>& logits, const Index& in, const Part& part, const Index& out) override;

private:
    std::optional<ResamplePlan> plan_;
    const LabelRule& rule_;
    LabelView labels_;
    Index shape_;
    int threads_;
    HostArithmetic arithmetic_;
};

// One axis of a plan that is local, or none
AxisOperator operator_along(int axis, const std::optional<ResamplePlan>& plan, const Index& in, const Index& out);

// Labels chunks as their logits come: along y in every layer of z, along z in every band of y. What linear resampling
// reaches beyond a chunk, a plane and a row of those before it, is all that is kept.
class LabelStream {
public:
    static constexpr std::int64_t kMargin = 1;  // planes and rows before a chunk that go with it

    // `plan`: none or one that is local.
    LabelStream(const Chunks& chunks, const std::optional<ResamplePlan>& plan, LabelSink& sink);

    // Write the labels a chunk decides. Its margin, which belongs to the chunks before it, is filled in.
    void add(const Index& number, Array4<Half> logits);

private:
    Sizes ready_before(int axis, const std::optional<ResamplePlan>& plan) const;

    const Chunks& chunks_;
    LabelSink& sink_;
    std::array<Sizes, 2> ready_;
    std::map<std::int64_t, Array4<Half>> planes_, rows_;  // the last plane of a layer, the last row of its latest chunk
};

// A label map in the axes of the image, contiguous.
LabelMap to_image(LabelMap map, const std::array<int, 3>& transpose_backward, int threads);
Array4<float> to_image(Array4<float> values, const std::array<int, 3>& transpose_backward, int threads);

}  // namespace fastnnunet::engine
