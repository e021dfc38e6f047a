"""Seconds of an r=4 student per 128^3 patch for several full-resolution stages, OpenVINO in bfloat16 on two threads.

python -m pipelines.measure.train.lite_student -o record.json
"""

import statistics
import time

import numpy as np
import openvino as ov
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from pipelines.measure.head import arguments, header, put

FEATURES, REPEATS = [8, 16, 32, 64, 80, 80], 7
RECIPES = {"width": ([3, 3, 3], 2), "[3,3,3]": ([3, 3, 3], 1), "[1,3,3]": ([1, 3, 3], 1), "[1,1,1]": ([1, 1, 1], 1)}


def network(kernel: list[int], convolutions: int) -> torch.nn.Module:
    """A six-stage student whose full-resolution stage has this kernel and as many convolutions on each side."""
    stages = len(FEATURES)
    return PlainConvUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=FEATURES,
        conv_op=torch.nn.Conv3d,
        kernel_sizes=[kernel, *[[3, 3, 3]] * (stages - 1)],
        strides=[[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
        n_conv_per_stage=[convolutions, *[2] * (stages - 1)],
        num_classes=3,
        n_conv_per_stage_decoder=[*[2] * (stages - 2), convolutions],
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).eval()


def measure(size: int = 128) -> dict[str, list[float]]:
    """Seconds of every run, recipes interleaved."""
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 2}
    image, models = np.random.default_rng(0).normal(size=(1, 1, size, size, size)).astype(np.float32), {}
    for name, recipe in RECIPES.items():
        model = ov.convert_model(network(*recipe), example_input=torch.from_numpy(image), input=list(image.shape))
        models[name] = ov.Core().compile_model(model, "CPU", settings)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(REPEATS):
        for name, model in models.items():
            start = time.perf_counter()
            model([image])
            times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    args = arguments(__doc__).parse_args()
    seconds_of = measure()
    put(
        {**header("seconds of an r=4 student per 128^3 patch, OpenVINO bf16, two threads"), "seconds": seconds_of},
        args.o,
    )
    for name, seconds in seconds_of.items():
        print(f"{name}: fastest {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s")
