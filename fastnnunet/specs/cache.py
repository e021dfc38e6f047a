"""What a soft-label cache holds: everything here changes a stored value, except the layout fields marked so."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastnnunet.errors import SpecError
from fastnnunet.specs.option import Option

LARGEST_TOLERANCE = 0.1
TeacherEngine = Literal["auto", "torch", "openvino", "onnxruntime", "tensorrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Recipe of one soft-label cache (YAML in `cache_specs/`)."""

    temperature: float = 1.0  # not used with a temperature_range
    # sparse_u8: many classes; logit_gap_u8: many temperatures; sigmoid_u8: region-based models; float16: the reference
    encoding: Literal["simplex_u8", "sparse_u8", "logit_gap_u8", "sigmoid_u8", "float16"] = "simplex_u8"
    levels: Literal[255, 63, 31] = 255  # of simplex_u8 and sparse_u8: fewer levels, a smaller cache, bound 1/levels
    tolerance: float = 0.0  # of sparse_u8: classes up to this probability are stored as one sum; 0: none
    temperature_range: tuple[float, float] | None = None  # of logit_gap_u8: lowest and highest T to train at
    policy: Literal["ensemble", "out_of_fold"] = "ensemble"  # out_of_fold: only folds that did not train on the case
    mirroring: bool = True
    step_size: float = 0.5
    # logits: averaged over mirrors, tiles and folds, as nnU-Net does; probabilities: every fold's soft labels averaged
    pooling: Literal["logits", "probabilities"] = "logits"
    engine: Annotated[
        TeacherEngine,
        Option(
            "--engine",
            "What runs the teacher (default: the recipe's); auto: OpenVINO on a CPU if installed, else PyTorch.",
        ),
    ] = "auto"
    # arithmetic of the teacher; auto: bf16 where the CPU and the engine have it, fp16 in TensorRT
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # layout: does not change a decoded value, so it is not part of the key
    # measured (measure/cache/cache_layout.py; lz4, 2 channels, T = 3, random 128^3 patch): 32 takes 0.74 bytes per
    # voxel and 3.7 ms, 24 0.93 and 4.4, 16 1.07 and 6.7; 48 0.77 and 3.5, 64 0.69 and 4.3
    chunk_zyx: tuple[int, int, int] = (32, 32, 32)  # aimed at: each axis is cut into about equal parts of this size
    # auto: zstd for small volumes, lz4 for large ones. zstd is a quarter smaller, but patches take 2 to 3 times as long
    # to decode; with lz4 it is as fast as from Blosc2 in nnU-Net's layout, or faster (see reader_speed)
    compressor: Literal["auto", "zstd", "lz4"] = "auto"
    # written once, read thousands of times: 14 % smaller than zstd 3 and decoded as fast; lz4 uses at most 9
    level: int = 19

    def __post_init__(self) -> None:
        problems = []
        if not 0.1 <= self.temperature <= 100:
            problems.append(f"temperature: got {self.temperature}, expected a number from 0.1 to 100")
        if self.levels not in (255, 63, 31) or (
            self.levels != 255 and self.encoding not in ("simplex_u8", "sparse_u8")
        ):
            problems.append(
                f"levels: got {self.levels}, expected 255, or 63 or 31 with encoding: simplex_u8 or sparse_u8"
            )
        if self.tolerance != 0 and not (
            self.encoding == "sparse_u8" and 1.001 / self.levels <= self.tolerance <= LARGEST_TOLERANCE
        ):
            problems.append(
                f"tolerance: got {self.tolerance}, expected 0, or with encoding: sparse_u8 a number above 1/levels "
                f"({1 / self.levels:.5f}) and up to {LARGEST_TOLERANCE}"
            )
        problems += self._range_problems()
        if self.pooling == "probabilities" and self.encoding == "logit_gap_u8":
            problems.append(
                "pooling: got probabilities, expected logits with encoding: logit_gap_u8, which stores them"
            )
        if not 0 < self.step_size <= 1:
            problems.append(f"step_size: got {self.step_size}, expected a number in (0, 1]")
        if any(c < 1 for c in self.chunk_zyx):
            problems.append(f"chunk_zyx: got {self.chunk_zyx}, expected three positive numbers")
        if not 1 <= self.level <= 22:
            problems.append(f"level: got {self.level}, expected 1 to 22")
        if problems:
            raise SpecError("; ".join(problems))

    def _range_problems(self) -> list[str]:
        if (self.encoding == "logit_gap_u8") != (self.temperature_range is not None):
            return [
                f"temperature_range: got {self.temperature_range} with encoding: {self.encoding}, expected two numbers "
                "such as [1.0, 4.0] with encoding: logit_gap_u8, and none otherwise"
            ]
        if self.temperature_range is None:
            return []
        low, high = self.temperature_range
        if not 0.1 <= low <= high <= min(100, 16 * low):
            return [
                f"temperature_range: got {low} to {high}, expected numbers from 0.1 to 100, in order, the second at "
                "most 16 times the first"
            ]
        return []
