"""A scan's intensities against those its teacher learnt from, in the units of the file.

Plans hold the *fingerprint*: statistics of the voxels of the training cases' foreground, for every channel. What may be
said by it depends on how the channel is normalised:

`CTNormalization` clips and scales by the fingerprint, so units matter: Hounsfield units, as scanners write them. A scan
is far outside when
- its own range (0.5 to 99.5 %) covers less than `MIN_COVERED` of that of the fingerprint. A whole scan shows air, fat
  and bone beside the foreground and covers all of it; images of 0 to 1, or scaled to mean 0, cover a few percent.
- hardly a voxel (`MIN_BELOW_ZERO`) is below 0, although voxels of the foreground were. Fat and air are below 0 in every
  CT; images of MR, of grey values, and CT stored without its offset are not.
- half of what the teacher labels (`MAX_CLIPPED`) lies beyond the fingerprint's 0.5 and 99.5 %, where one percent of the
  training's foreground did: other units, with a range as wide.
`RGBTo01Normalization` and `NoNormalization` take values as they are: far outside is a range of less than `MIN_SPREAD`
of the fingerprint's, such as 0 to 1 where 0 to 255 was learnt. Dark pictures are not that dark.
`ZScoreNormalization`, `RescaleTo01Normalization` and unknown ones make units, scanners and sequences alike, and MR of
one data set differs a thousandfold: the fingerprint says nothing there. Only what is no image at all is told: values
that are no numbers, or one value in all but `MAX_DIFFERENT` of the voxels. That is told of every channel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnnunet.errors import ImageError
from fastnnunet.nnunet.files.model import Model
from fastnnunet.nnunet.files.plans import intensity_properties

MIN_COVERED = 0.05
MIN_BELOW_ZERO = 1e-4
MAX_CLIPPED = 0.5
MIN_SPREAD = 0.01
MAX_DIFFERENT = 1e-3
LOOKED_AT = 2**22  # voxels of a channel: percentiles of more differ in what is no matter here
SAMPLE = 8  # scans that stand for a folder
CT, AS_THEY_ARE = "CTNormalization", ("RGBTo01Normalization", "NoNormalization")


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensities:
    """Of one channel of a whole scan, as the file has them. Statistics are of finite values, 0 where there are none."""

    minimum: float
    percentile_00_5: float
    median: float
    percentile_99_5: float
    maximum: float
    below_zero: float  # share of the voxels
    at_median: float  # share of the voxels
    not_finite: float  # share of the voxels

    @property
    def range_text(self) -> str:
        """In words, for messages."""
        return f"{self.percentile_00_5:.4g} to {self.percentile_99_5:.4g} (0.5 to 99.5 %)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What the plans say of one channel; statistics of the training's foreground."""

    scheme: str  # class name of the normalisation
    percentile_00_5: float
    percentile_99_5: float
    mean: float
    std: float
    minimum: float

    @property
    def width(self) -> float:
        return self.percentile_99_5 - self.percentile_00_5

    @property
    def range_text(self) -> str:
        """In words, for messages."""
        return f"{self.percentile_00_5:.4g} to {self.percentile_99_5:.4g} (0.5 to 99.5 %)"


def fingerprints_of(model: Model) -> tuple[Fingerprint, ...]:
    """Of every channel of the image, in order. Raises MismatchError for plans without statistics."""
    schemes = model.config.normalization_schemes
    statistics = intensity_properties(model.manager)
    made = []
    for channel, scheme in enumerate(schemes):
        known = statistics.get(str(channel), {})
        low, high = float(known.get("percentile_00_5", 0)), float(known.get("percentile_99_5", 0))
        made.append(
            Fingerprint(
                scheme=str(scheme),
                percentile_00_5=low,
                percentile_99_5=high,
                mean=float(known.get("mean", 0)),
                std=float(known.get("std", 1)),
                minimum=float(known.get("min", low)),
            )
        )
    return tuple(made)


def intensities_of(channel_ZYX: np.ndarray) -> Intensities:
    """Measure one channel; of more than `LOOKED_AT` voxels an even choice."""
    values = channel_ZYX.reshape(-1)
    values = values[:: max(1, -(-values.size // LOOKED_AT))]
    finite = values[np.isfinite(values)]
    if not finite.size:
        finite = np.zeros(1, np.float32)
    minimum, low, median, high, maximum = np.percentile(finite, (0, 0.5, 50, 99.5, 100)).tolist()
    return Intensities(
        minimum=minimum,
        percentile_00_5=low,
        median=median,
        percentile_99_5=high,
        maximum=maximum,
        below_zero=float((finite < 0).mean()),
        at_median=float((finite == np.float32(median)).mean()),
        not_finite=float(1 - np.isfinite(values).mean()),
    )


def outside(found: Intensities, expected: Fingerprint) -> str | None:
    """By which rule a channel is far outside its fingerprint, in words; None when it is not."""
    if found.not_finite > 0:
        return f"{found.not_finite:.2%} of the voxels are no finite numbers"
    if found.at_median >= 1 - MAX_DIFFERENT:
        return f"{found.at_median:.2%} of the voxels have the value {found.median:.4g}"
    if expected.width <= 0:
        return None
    got = f"got {found.range_text}, the teacher learnt from {expected.range_text}"
    spread = found.percentile_99_5 - found.percentile_00_5
    if expected.scheme == CT:
        upper = min(found.percentile_99_5, expected.percentile_99_5)
        covered = max(0.0, upper - max(found.percentile_00_5, expected.percentile_00_5)) / expected.width
        if covered < MIN_COVERED:
            return f"{got}; of this range {covered:.1%} are covered"
        if expected.minimum < 0 and found.below_zero < MIN_BELOW_ZERO:
            return f"{got}, down to {expected.minimum:.4g}; none below 0 are no Hounsfield units"
    elif expected.scheme in AS_THEY_ARE and spread < MIN_SPREAD * expected.width:
        return f"{got}, and values are taken as they are"
    return None


def clipped_share(image_CZYX: np.ndarray, foreground_ZYX: np.ndarray, fingerprints: Sequence[Fingerprint]) -> float:
    """The largest share over CT channels of foreground voxels at either end of the fingerprint's range, 0 without any.

    `image_CZYX` is the preprocessed image, in which normalisation has clipped them. Resampling blurs the ends, so a
    hundredth of the range counts as end.
    """
    largest = 0.0
    if not foreground_ZYX.any():
        return largest
    for channel, expected in zip(image_CZYX, fingerprints, strict=False):  # a cascade's channels come after
        if expected.scheme != CT or expected.width <= 0:
            continue
        values = channel[foreground_ZYX] * max(expected.std, 1e-8) + expected.mean
        margin = expected.width / 100
        low, high = expected.percentile_00_5 + margin, expected.percentile_99_5 - margin
        largest = max(largest, float(((values <= low) | (values >= high)).mean()))
    return largest


def sample_of(cases: Mapping[str, tuple[Path, ...]], count: int = SAMPLE) -> dict[str, tuple[Path, ...]]:
    """At most `count` of the cases, evenly among their names."""
    names = sorted(cases)
    chosen = [names[(i * len(names)) // min(count, len(names))] for i in range(min(count, len(names)))]
    return {name: cases[name] for name in chosen}


def require_modality(measured: Mapping[str, Sequence[Intensities]], model: Model) -> None:
    """Refuse scans of which every one is far outside: they are of another modality or in other units.

    Raises ImageError with the fingerprint's range and what was found.
    """
    fingerprints = fingerprints_of(model)
    problems = {case: _first_outside(channels, fingerprints) for case, channels in measured.items()}
    if not problems or any(problem is None for problem in problems.values()):
        return
    lines = [f"  {case}: {problem}" for case, problem in sorted(problems.items())]
    raise ImageError(
        f"these scans are no scans as the model learnt from: all {len(lines)} looked at are far outside\n"
        + "\n".join(lines)
        + "\ngive scans of the model's modality in the units it was trained in (CT: Hounsfield units), or another model"
    )


def _first_outside(channels: Sequence[Intensities], fingerprints: Sequence[Fingerprint]) -> str | None:
    for number, (found, expected) in enumerate(zip(channels, fingerprints, strict=False)):
        if (problem := outside(found, expected)) is not None:
            return f"channel {number} ({expected.scheme}): {problem}"
    return None
