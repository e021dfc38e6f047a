"""Whether an exported graph computes what PyTorch computes.

Both sum the same numbers in another order, so logits differ in the last digits, and where the two best are as near to
each other as that, labels differ. A graph is refused for a logit that differs by more than rounding can, and for labels
that differ where no rounding explains it.

Patches cost most of an export. Each fold computes two of them in both, in a batch and one by one. Where patches are
large and small ones say as much (see `small_patches`), the first fold computes one, and what batches do is looked at on
two small ones; the other folds, which are the same graph with other weights, are compared on those alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastnnunet.errors import ParityError
from fastnnunet.export.graph import larger_patches
from fastnnunet.specs.bundle import INPUT, OUTPUT

if TYPE_CHECKING:
    import onnx
    import torch

# fp32 convolutions summed in another order differ in the last digits; anything more is a wrong graph
RELATIVE_TOLERANCE = 1e-3
LABEL_AGREEMENT = 0.9999
# Root mean square of the differences, relative to that of the logits around their mean: of rounding to float32 about
# 1e-5, of one to float16 or TF32 about 1e-3
ROUNDING = 3e-4
# How far above their root mean square single differences of rounding are taken to lie
_TAIL = 10
# Voxels of a patch above which one is computed, not two
LARGE_PATCH = 2**18
_SLAB = 2**22  # numbers compared at once
_ELEMENTWISE = frozenset(("Add", "Concat", "Mul", "PRelu"))
_LOCAL = _ELEMENTWISE | {
    *("AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Dropout", "Elu", "Identity"),
    *("InstanceNormalization", "LeakyRelu", "MaxPool", "Relu", "Sigmoid"),
}


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far the exported model is from PyTorch on the parity patches; of an ensemble, its worst fold."""

    patches: int
    real: bool  # patches of preprocessed cases, else noise
    max_abs_difference: float  # in logits
    max_abs_logit: float
    label_agreement: float  # share of voxels with the same label (with regions: with the same regions)


class ParityCheck:
    """The folds of a model, one after the other, on the same patches."""

    def __init__(self, network: "torch.nn.Module", image_NCX: np.ndarray, *, is_real: bool, has_regions: bool) -> None:
        """`network` computes the fold that was loaded into it last; `image_NCX`: float32 (2, C, *patch)."""
        self._network = network
        self.image_NCX = image_NCX  # what each fold computes
        self._both_NCX = image_NCX
        self._small_NCX: np.ndarray | None = None
        self._is_real, self._has_regions = is_real, has_regions

    def choose_patches(self, model: "onnx.ModelProto", multiples: tuple[int, ...] | None) -> None:
        """Leave out the second patch where patches are large and smaller ones say what it would."""
        if math.prod(self.image_NCX.shape[2:]) > LARGE_PATCH:
            self._small_NCX = small_patches(model, self.image_NCX, multiples)
        if self._small_NCX is not None:
            self.image_NCX = self.image_NCX[:1]

    def check_first(
        self,
        model: "onnx.ModelProto",
        model_file: Path,
        multiples: tuple[int, ...] | None,
        begin: Callable[[str], None],
    ) -> tuple[np.ndarray, ParityReport]:
        """Compare the first fold, and what holds for all when it holds for one: batches, other sizes of patches.

        `begin` is told which of two parts begins. Returns the logits of the patches, float32 (N, heads, *patch).
        Raises ParityError.
        """
        logits_NKX, report = self._check_whole(model_file, begin)
        if self._small_NCX is not None and self._check_small(model) is None:
            self._small_NCX = None
            self._compare(model_file, self._both_NCX, self._run(self._both_NCX), {len(self._both_NCX)})
        if multiples:
            larger_NCX = larger_patches(self.image_NCX, multiples)
            self._compare(model_file, larger_NCX, self._run(larger_NCX), {len(larger_NCX), 1})
        return logits_NKX, report

    def check_other(
        self, model: "onnx.ModelProto", model_file: Path, begin: Callable[[str], None]
    ) -> tuple[np.ndarray, ParityReport]:
        """Compare another fold: the first one's graph with other weights, so small patches do where they did for that.

        The logits are then those of ONNX Runtime. Otherwise as `check_first`.
        """
        if self._small_NCX is None:
            return self._check_whole(model_file, begin)
        begin(f"{_words(self._small_NCX)} through PyTorch and ONNX Runtime, to compare")
        report = self._check_small(model)
        if report is None:
            return self._check_whole(model_file, lambda what: None)
        begin(f"{_words(self.image_NCX)} through ONNX Runtime")
        return next(_runs(model_file, self.image_NCX, {len(self.image_NCX)})), report

    def check_fixed_batch(self, model_file: Path, batch_size: int, expected_NKX: np.ndarray) -> None:
        """As `check`, of a model that takes exactly `batch_size` patches. Raises ParityError."""
        images, logits = (np.resize(a, (batch_size, *a.shape[1:])) for a in (self.image_NCX, expected_NKX))
        self._compare(model_file, images, logits, {batch_size})

    def _check_whole(self, model_file: Path, begin: Callable[[str], None]) -> tuple[np.ndarray, ParityReport]:
        begin(f"{_words(self.image_NCX)} through PyTorch")
        logits_NKX = self._run(self.image_NCX)
        begin("the same through ONNX Runtime, to compare")
        return logits_NKX, self._compare(model_file, self.image_NCX, logits_NKX, {len(self.image_NCX), 1})

    def _check_small(self, model: "onnx.ModelProto") -> ParityReport | None:
        """A batch of small patches; None where it is no proof."""
        assert self._small_NCX is not None
        try:
            logits_NKX = self._run(self._small_NCX)
            return self._compare(for_other_sizes(model), self._small_NCX, logits_NKX, {len(self._small_NCX)})
        except Exception:  # whatever a network or its graph says to another size than its own: whole patches decide
            return None

    def _run(self, image_NCX: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._network(torch.from_numpy(image_NCX)).float().numpy()

    def _compare(
        self, model: Path | bytes, image_NCX: np.ndarray, expected_NKX: np.ndarray, batch_sizes: set[int]
    ) -> ParityReport:
        reports = [
            judge(got_NKX, expected_NKX, is_real=self._is_real, has_regions=self._has_regions)
            for got_NKX in _runs(model, image_NCX, batch_sizes)
        ]
        worst = max(reports, key=lambda report: report.max_abs_difference)
        return replace(worst, label_agreement=min(report.label_agreement for report in reports))


def small_patches(
    model: "onnx.ModelProto", image_NCX: np.ndarray, multiples: tuple[int, ...] | None
) -> np.ndarray | None:
    """Two small patches out of a large one, float32 (2, C, *small); None where they say less than whole ones.

    They say as much where every operator does the same everywhere, that is where nothing in the graph depends on the
    size of the patch. `multiples`: what the axes of a patch are multiples of, None if unknown.
    """
    spatial = image_NCX.ndim - 2
    fields = {tensor.name for tensor in model.graph.initializer if math.prod(tensor.dims[-spatial:]) > 1}
    if multiples is None or not all(is_local(node, fields) for node in model.graph.node):
        return None
    # eight voxels at least at the bottom of a U-Net: what an instance norm makes of one says nothing
    size = [min(whole, 2 * m) for whole, m in zip(image_NCX.shape[2:], multiples, strict=True)]
    starts = [(0, whole - n) for whole, n in zip(image_NCX.shape[2:], size, strict=True)]
    if not any(last for _, last in starts):
        return None
    corners = [
        tuple(slice(start[end], start[end] + n) for start, n in zip(starts, size, strict=True)) for end in (0, 1)
    ]
    return np.stack([image_NCX[0][(slice(None), *corner)] for corner in corners])


def for_other_sizes(model: "onnx.ModelProto") -> bytes:
    """The same graph and weights, for patches of any size."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim[2:]):
            dimension.dim_param = f"axis{axis}"
    del copy.graph.value_info[:]
    return copy.SerializeToString()


def _words(image_NCX: np.ndarray) -> str:
    count, size = len(image_NCX), " x ".join(map(str, image_NCX.shape[2:]))
    return f"{count} patches of {size}" if count > 1 else f"a patch of {size}"


def is_local(node: "onnx.NodeProto", fields: set[str]) -> bool:
    """`fields`: weights that are no single number for all places; what is not a convolution must not use them."""
    sized = any(a.name == "output_shape" or (a.name == "auto_pad" and a.s != b"NOTSET") for a in node.attribute)
    uses_field = node.op_type in _ELEMENTWISE and not fields.isdisjoint(node.input)
    return node.op_type in _LOCAL and not sized and not uses_field and node.domain == ""


def _runs(model: Path | bytes, image_NCX: np.ndarray, batch_sizes: set[int]) -> Iterator[np.ndarray]:
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    for size in batch_sizes:
        batches = [image_NCX[n : n + size] for n in range(0, len(image_NCX), size)]
        yield np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in batches])


def judge(got_NKX: np.ndarray, expected_NKX: np.ndarray, *, is_real: bool, has_regions: bool) -> ParityReport:
    """How far logits are from PyTorch's, both float32 (N, heads, *patch). Raises ParityError when that is too far."""
    largest = scale = squares = spread = 0.0
    for got, expected in _slabs(got_NKX, expected_NKX):
        difference = got - expected
        largest = float(np.maximum(largest, np.abs(difference).max()))  # keeps NaN
        scale = float(np.maximum(scale, np.abs(expected).max()))
        squares += float(np.square(difference, dtype=np.float64).sum())
        around = expected if has_regions else expected - expected.mean(axis=1, keepdims=True)
        spread += float(np.square(around, dtype=np.float64).sum())
    typical, spread = (float(np.sqrt(total / expected_NKX.size)) for total in (squares, spread))
    is_rounding = typical <= max(ROUNDING * spread, 16 * float(np.finfo(np.float32).eps) * scale)
    explained = min(largest, _TAIL * typical) if is_rounding else 0.0
    differing = unexplained = 0
    for got, expected in _slabs(got_NKX, expected_NKX):
        margin = _lost_margins(got, expected, has_regions)
        differing += int((margin >= 0).sum())
        unexplained += int((margin > explained).sum())
    voxels = expected_NKX.size // expected_NKX.shape[1]
    agreement, explicable = 1 - differing / voxels, 1 - unexplained / voxels
    if not largest <= RELATIVE_TOLERANCE * scale or explicable < LABEL_AGREEMENT:
        kind = "real" if is_real else "noise"
        raise ParityError(
            f"the exported model differs from PyTorch on {len(expected_NKX)} {kind} patches:\n"
            f"  largest logit difference {largest:.3g}, allowed {RELATIVE_TOLERANCE * scale:.3g}\n"
            f"  same label on {agreement:.4%} of voxels, or on {explicable:.4%} with those where rounding explains "
            f"another, expected at least {LABEL_AGREEMENT:.2%}\nno bundle was written"
        )
    return ParityReport(
        patches=len(expected_NKX),
        real=is_real,
        max_abs_difference=largest,
        max_abs_logit=scale,
        label_agreement=agreement,
    )


def _lost_margins(got_NKX: np.ndarray, expected_NKX: np.ndarray, has_regions: bool) -> np.ndarray:
    """By how much one logit has to differ for the label to be another, where it is, (N, *patch); -1 elsewhere.

    A label is the greatest logit, so two of them share the way; a region is where its logit is positive.
    """
    if has_regions:
        other = (got_NKX > 0) != (expected_NKX > 0)
        return np.where(other, np.abs(expected_NKX), -1).max(axis=1)
    label = got_NKX.argmax(1)
    best, taken = expected_NKX.max(1), np.take_along_axis(expected_NKX, label[:, None], 1)[:, 0]
    return np.where(label == expected_NKX.argmax(1), -1, (best - taken) / 2)


def _slabs(*arrays_NKX: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Parts along the first axis of the patch."""
    length = arrays_NKX[0].shape[2]
    step = max(1, _SLAB * length // arrays_NKX[0].size)
    for start in range(0, length, step):
        yield tuple(array[:, :, start : start + step] for array in arrays_NKX)
