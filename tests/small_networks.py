"""Networks of other kinds than the toy bundles', small and untrained; 3 heads."""

from typing import Any

import torch


def residual_network(**changes: Any) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """Sums of two branches, 1x1 projections, anisotropic strides; returns it and its patch (channels, z, y, x)."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    torch.manual_seed(0)
    arguments = dict(
        input_channels=2,
        n_stages=2,
        features_per_stage=[8, 12],
        conv_op=torch.nn.Conv3d,
        kernel_sizes=[[1, 3, 3], [3, 3, 3]],
        strides=[[1, 1, 1], [1, 2, 2]],
        n_blocks_per_stage=[1, 2],
        num_classes=3,
        n_conv_per_stage_decoder=[1],
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
    )
    return ResidualEncoderUNet(**arguments | changes).eval(), (2, 8, 16, 16)


def primus_network() -> tuple[torch.nn.Module, tuple[int, ...]]:
    """A transformer of one block: convolutions only where patches go in and come out."""
    from dynamic_network_architectures.architectures.primus import Primus

    torch.manual_seed(0)
    patch = (16, 16, 16)
    return Primus(1, 48, (8, 8, 8), 3, 1, 4, patch, scale_attn_inner=True, init_values=0.1).eval(), (1, *patch)
