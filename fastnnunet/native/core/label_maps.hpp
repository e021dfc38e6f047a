// Label maps as such: resampling them, and tidying them (largest components, small pieces, holes).
//
// Components hang together by faces, edges and corners (as in nnU-Net's postprocessing); holes are closed off by faces.
#pragma once

#include <cstdint>
#include <vector>

#include "core/resample_plan.hpp"
#include "core/view.hpp"

namespace fastnnunet {

// As nnU-Net resamples a segmentation: every label's indicator in plane, the largest wins, nearest between planes. Of
// labels that tie the nearest neighbour's is taken, else the lowest. `plan` is one of order 1 and order_z 0 in the
// scipy convention; labels are below 2^24 in magnitude. Throws std::invalid_argument where the shapes are not the
// plan's.
void resample_labels(const Volume<const std::int32_t>& labels, const Volume<std::int32_t>& out,
                     const ResamplePlan& plan, int threads);

// Of the voxels with any of `labels`, taken as one structure, those outside the largest component become `background`.
// Several components of the largest size all stay, as nnU-Net leaves them. Label: uint8 or uint16, as below.
template <class Label>
void keep_largest(const Volume<Label>& map, const std::vector<std::int64_t>& labels, std::int64_t background,
                  int threads);

// Components of fewer voxels, each label by itself, become 0.
template <class Label>
void remove_small(const Volume<Label>& map, std::int64_t min_voxels, int threads);

// Zeros enclosed by one of `labels` become that label; what another label covers stays. Enclosed: no way out of the
// label by steps across faces; the border of the image is out, but for those above and below a single plane. Where
// structures lie inside each other a hole goes to the innermost, whose bounding box is the smallest.
template <class Label>
void fill_label_holes(const Volume<Label>& map, const std::vector<std::int64_t>& labels, int threads);

}  // namespace fastnnunet
