"""model.onnx -> the same graph with Q/DQ nodes around its convolutions, by ONNX Runtime's quantiser.

Symmetric int8 with stored zero points of 0, as TensorRT wants it: weights per output channel, activations per tensor,
scale = largest magnitude / 127, for activations over all calibration patches. What goes into a convolution is
quantised, not what comes out: it goes into a norm, which is better computed from all its digits, and the logits of two
labels would often become equal.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fastnnunet.errors import BackendError
from fastnnunet.export.patches import Patches
from fastnnunet.export.quantized import prepare_quantized

_OPERATORS = ["Conv", "ConvTranspose"]


def check_onnx_quantizer() -> None:
    """Raise BackendError, naming the extra, when the quantiser lacks a package."""
    if find_spec("onnx") is None:
        raise BackendError(
            "quantising needs the package onnx, which the base install leaves out\n"
            "install it: pip install 'fastnnunet[quantize]'"
        )


def quantize_onnx(
    model_file: Path,
    patches_NCX: Patches,
    out: Path,
    *,
    batch_size: int = 1,
    on_patches: Callable[[int, int], None] | None = None,
) -> None:
    """Calibrate `model_file` on float32 patches (N, C, *patch) and write its quantised twin to `out`.

    `batch_size`: what the model takes at once; patches beyond the last full batch are not used.
    Raises MismatchError when the result is not what TensorRT takes, or the model has no convolution.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        """Batches under the name of the model's input."""

        def __init__(self, name: str) -> None:
            self._name, self._next = name, 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            stop = self._next + batch_size
            if stop > len(patches_NCX):
                return None
            batch = patches_NCX[self._next : stop]
            self._next = stop
            if on_patches:
                on_patches(stop, len(patches_NCX))
            return {self._name: batch}

    model = onnx.load(str(model_file))  # a file name would have it write beside the file
    with _no_advice():
        quantize_static(
            model,
            str(out),
            Batches(model.graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_OPERATORS,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": _OPERATORS,
            },
        )
    prepare_quantized(onnx.load(str(out)))


@contextmanager
def _no_advice() -> Iterator[None]:
    """It advises on standard error to prepare the model first, which the exporter has done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
