"""model.onnx -> the same graph with Q/DQ nodes around its convolutions, by ONNX Runtime's quantiser.

Symmetric int8 with stored zero points of 0, as TensorRT wants it: weights per output channel, activations per tensor,
scale = largest magnitude / 127, for activations over all calibration patches. What goes into a convolution is
quantised, not what comes out: it goes into a norm, which is better computed from all its digits, and the logits of two
labels would often become equal. Skip connections and sums of residual blocks keep all digits too.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastnnunet.errors import BackendError
from fastnnunet.events import Listener, ignore
from fastnnunet.export.patches import CalibrationBatches, Patches
from fastnnunet.export.quantized import prepare_quantized

if TYPE_CHECKING:
    import onnx

_OPERATORS = ["Conv", "ConvTranspose"]


class _Reader:
    """What the quantiser reads (its CalibrationDataReader): batches under the name of the model's input, then None."""

    def __init__(self, name: str, batches: CalibrationBatches) -> None:
        self._name, self._batches = name, iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


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
    progress: Listener = ignore,
) -> None:
    """Calibrate `model_file` on float32 patches (N, C, *patch) and write its quantised twin to `out`.

    `batch_size`: what the model takes at once; patches beyond the last full batch are not used.
    Raises MismatchError when the result is not what TensorRT takes, or the model has no convolution.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    model = onnx.load(str(model_file))  # a file name would have it write beside the file
    with _no_advice():
        quantize_static(
            model,
            str(out),
            _Reader(model.graph.input[0].name, CalibrationBatches(patches_NCX, batch_size, progress)),
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
    quantized = onnx.load(str(out))
    _keep_other_inputs(quantized)
    onnx.save(quantized, str(out))
    prepare_quantized(quantized)


def _keep_other_inputs(model: "onnx.ModelProto") -> None:
    """Give what is not a convolution the tensor from before the rounding: the quantiser changes all its readers.

    Skip connections and sums of residual blocks would be rounded, and in the end twice.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in (*_OPERATORS, "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            if name in made_by and made_by[name].op_type == "DequantizeLinear":
                rounding = made_by.get(made_by[name].input[0])
                if rounding is not None:  # else stored values, which have no other form
                    node.input[index] = rounding.input[0]


@contextmanager
def _no_advice() -> Iterator[None]:
    """It advises, through the root logger which that sets up, to prepare the model first; the exporter has done so."""
    disabled, handlers = logging.root.manager.disable, logging.root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers
