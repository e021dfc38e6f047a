"""FastnnUNet: distil a trained nnU-Net v2 ensemble into one small student and predict with it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastnnunet.api.fast_predictor import FastPredictor as FastPredictor

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`fastnnunet.FastPredictor`, imported when asked for: importing the package alone stays cheap."""
    if name == "FastPredictor":
        from fastnnunet.api.fast_predictor import FastPredictor

        return FastPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
