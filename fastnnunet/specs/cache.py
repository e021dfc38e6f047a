"""What a soft-label cache holds: everything here changes a stored value, except the layout fields marked so."""

from dataclasses import dataclass
from typing import Literal

from fastnnunet.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Recipe of one soft-label cache (YAML in `cache_specs/`)."""

    temperature: float = 3.0
    # sigmoid_u8: region-based models; float16: the reference the others are judged by
    encoding: Literal["simplex_u8", "sigmoid_u8", "float16"] = "simplex_u8"
    levels: Literal[255, 63, 31] = 255  # of simplex_u8: fewer levels, a smaller cache, a larger bound 1/levels
    policy: Literal["ensemble", "out_of_fold"] = "ensemble"  # out_of_fold: only folds that did not train on the case
    mirroring: bool = True
    step_size: float = 0.5
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # arithmetic of the teacher; auto = bf16 where the CPU has it
    # layout: does not change a decoded value, so it is not part of the key
    # measured (tests/benchmarks/cache_layout.py; lz4, 2 channels, T = 3, random 128^3 patch): 32 takes 0.74 bytes per
    # voxel and 3.7 ms, 24 0.93 and 4.4, 16 1.07 and 6.7; 48 0.77 and 3.5, 64 0.69 and 4.3
    chunk_zyx: tuple[int, int, int] = (32, 32, 32)  # aimed at: each axis is cut into about equal parts of this size
    # auto: zstd for small volumes, lz4 for large ones. zstd is a quarter smaller, but patches take 2 to 3 times as long
    # to decode; with lz4 it is as fast as from Blosc2 in nnU-Net's layout, or faster (tests/benchmarks/reader_speed.py)
    compressor: Literal["auto", "zstd", "lz4"] = "auto"
    # written once, read thousands of times: 14 % smaller than zstd 3 and decoded as fast; lz4 uses at most 9
    level: int = 19

    def __post_init__(self) -> None:
        problems = []
        if not 0.1 <= self.temperature <= 100:
            problems.append(f"temperature: got {self.temperature}, expected a number from 0.1 to 100")
        if self.levels not in (255, 63, 31) or (self.levels != 255 and self.encoding != "simplex_u8"):
            problems.append(f"levels: got {self.levels}, expected 255, or 63 or 31 with encoding: simplex_u8")
        if not 0 < self.step_size <= 1:
            problems.append(f"step_size: got {self.step_size}, expected a number in (0, 1]")
        if any(c < 1 for c in self.chunk_zyx):
            problems.append(f"chunk_zyx: got {self.chunk_zyx}, expected three positive numbers")
        if not 1 <= self.level <= 22:
            problems.append(f"level: got {self.level}, expected 1 to 22")
        if problems:
            raise SpecError("; ".join(problems))


LAYOUT_FIELDS = ("chunk_zyx", "compressor", "level")
