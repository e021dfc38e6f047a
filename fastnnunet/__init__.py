"""FastnnUNet: distil a trained nnU-Net v2 ensemble into one small student and predict with it."""

__version__ = "0.1.0"
