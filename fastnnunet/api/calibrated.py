"""A student's probabilities against those of its teacher, which the cache holds."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.events import Listener, Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastnnunet.cache.store.storage import Place
    from fastnnunet.evaluate.calibration import CalibrationSummary
    from fastnnunet.nnunet.files.cases import PreprocessedCases
    from fastnnunet.teachers.nnunet import NnUNetTeacher

LARGEST = 1 << 29  # probabilities of a case; above, three float32 arrays of them would take more than 6 GB
FITTED_CASES = 8  # that a temperature is fitted on: one number does not need more
FITTED_VALUES = 1 << 24  # logits that it is fitted on


def student_calibration(
    model: Path,
    configuration: str,
    cases: "PreprocessedCases",
    held_out: Sequence[str],
    cache: "Place",
    temperature: float,
    threads: int,
    progress: Listener,
) -> "CalibrationSummary | None":
    """Compare the student in an nnU-Net model folder with the soft labels of `held_out`, both at `temperature`.

    On preprocessed cases, where the soft labels are. Cases of more than `LARGEST` probabilities are left out; None when
    that leaves none.
    """
    from fastnnunet.cache.codecs.base import sigmoid, softmax
    from fastnnunet.evaluate.calibration import case_calibration, summarise

    student, total = _student(model, configuration), None
    regions = None
    if student.has_regions:
        regions = [r if isinstance(r, tuple | list) else (r,) for r in student.files.model.labels.foreground_regions]
    for logits_CZYX, soft_CZYX in _compared(student, cases, held_out, cache, temperature, threads, progress):
        found = case_calibration(
            (sigmoid if student.has_regions else softmax)(logits_CZYX, temperature),
            soft_CZYX,
            spacing_mm=_spacing(student),
            regions=regions,
        )
        total = found if total is None else total + found
    return None if total is None else summarise(total)


def student_temperature(
    model: Path,
    configuration: str,
    cases: "PreprocessedCases",
    learnt_from: Sequence[str],
    cache: "Place",
    temperature: float,
    threads: int,
    progress: Listener,
) -> float:
    """What to divide the student's logits by so that its probabilities come closest to its teacher's; see
    `fit_temperature`. 1.0 where no case is small enough to tell.

    Fitted on at most eight of the cases it learnt from, so that those held out judge it: on both kinds of cases the
    temperature is the same within a few per cent (2.12 and 2.05, 1.31 and 1.29, hippocampus).
    """
    import numpy as np

    from fastnnunet.evaluate.temperature import border_sample, fit_temperature

    student = _student(model, configuration)
    places = np.linspace(0, len(learnt_from) - 1, min(FITTED_CASES, len(learnt_from))).astype(int)
    chosen = [learnt_from[place] for place in places]
    count = max(1, FITTED_VALUES // (student.num_heads * max(1, len(chosen))))
    samples = [
        border_sample(logits_CZYX, soft_CZYX, count, spacing_mm=_spacing(student), regions=student.has_regions)
        for logits_CZYX, soft_CZYX in _compared(student, cases, chosen, cache, temperature, threads, progress)
    ]
    if not samples:
        return 1.0
    logits_NC, soft_NC = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    return fit_temperature(logits_NC / temperature, soft_NC, regions=student.has_regions)


def _student(model: Path, configuration: str) -> "NnUNetTeacher":
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.teacher import PublishedSpec
    from fastnnunet.teachers.published import open_published

    return open_published(PublishedSpec(path=model, configuration=configuration), CacheSpec())


def _spacing(student: "NnUNetTeacher") -> tuple[float, ...] | None:
    spacing = student.files.model.config.spacing
    return tuple(map(float, spacing)) if len(spacing) == 3 else None  # in 2d slices have none


def _compared(
    student: "NnUNetTeacher",
    cases: "PreprocessedCases",
    case_ids: Sequence[str],
    cache: "Place",
    temperature: float,
    threads: int,
    progress: Listener,
) -> "Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]":
    """Logits of the student and soft labels at `temperature`, both (C, z, y, x), of every case that is small enough."""
    from fastnnunet.cache.store.reader import SoftLabelReader

    reader = SoftLabelReader(cache, temperature)
    small = [case for case in case_ids if student.num_heads * math.prod(reader.shape_zyx(case)) <= LARGEST]
    if not small:
        return
    loaded = student.load(threads)
    for done, case in enumerate(small, start=1):
        image_CZYX = cases.image_CZYX(case)
        shape = image_CZYX.shape[1:]
        ((_, logits_CZYX),) = loaded.blocks(image_CZYX, student.folds, shape)
        yield logits_CZYX, reader.to_probabilities(reader.read_patch(case, (0, 0, 0), shape))
        progress(Progress(what="comparing probabilities", done=done, total=len(small), unit="cases"))
