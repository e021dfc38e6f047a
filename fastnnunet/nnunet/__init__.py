"""The only package that imports nnunetv2 and batchgenerators*: everything nnU-Net comes in through here."""

import os

# nnunetv2 starts 8 processes for every pool by default, whatever the machine; it reads the variable on import.
os.environ.setdefault("nnUNet_def_n_proc", str(min(8, os.cpu_count() or 1)))
