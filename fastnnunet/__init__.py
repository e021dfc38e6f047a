"""FastnnUNet: distil a trained nnU-Net v2 ensemble into one small student and predict with it."""

from typing import TYPE_CHECKING, Any

from fastnnunet.version import __version__ as __version__

if TYPE_CHECKING:
    from fastnnunet.api.fast_predictor import FastPredictor as FastPredictor


def __getattr__(name: str) -> Any:
    """`fastnnunet.FastPredictor`, imported when asked for: importing the package alone stays cheap."""
    if name == "FastPredictor":
        from fastnnunet.api.fast_predictor import FastPredictor

        return FastPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
