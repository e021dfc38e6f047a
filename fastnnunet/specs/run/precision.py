"""The precisions that a network may compute in."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16", "int8"]
