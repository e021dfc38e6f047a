"""A student's probabilities against those of its teacher, which the cache holds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.events import Listener, Progress

if TYPE_CHECKING:
    from fastnnunet.cache.store.storage import Place
    from fastnnunet.evaluate.calibration import CalibrationSummary
    from fastnnunet.nnunet.files.cases import PreprocessedCases

LARGEST = 1 << 29  # probabilities of a case; above, three float32 arrays of them would take more than 6 GB


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
    from fastnnunet.cache.store.reader import SoftLabelReader
    from fastnnunet.evaluate.calibration import case_calibration, summarise
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.teacher import PublishedSpec
    from fastnnunet.teachers.published import open_published

    reader = SoftLabelReader(cache, temperature)
    student = open_published(PublishedSpec(path=model, configuration=configuration), CacheSpec())
    small = [case for case in held_out if student.num_heads * math.prod(reader.shape_zyx(case)) <= LARGEST]
    if not small:
        return None
    config = student.files.model.config
    spacing = tuple(map(float, config.spacing)) if len(config.spacing) == 3 else None  # in 2d slices have none
    regions = None
    if student.has_regions:
        regions = [r if isinstance(r, tuple | list) else (r,) for r in student.files.model.labels.foreground_regions]
    loaded, total = student.load(threads), None
    for done, case in enumerate(small, start=1):
        image_CZYX = cases.image_CZYX(case)
        shape = image_CZYX.shape[1:]
        ((_, logits_CZYX),) = loaded.blocks(image_CZYX, student.folds, shape)
        found = case_calibration(
            (sigmoid if student.has_regions else softmax)(logits_CZYX, temperature),
            reader.to_probabilities(reader.read_patch(case, (0, 0, 0), shape)),
            spacing_mm=spacing,
            regions=regions,
        )
        total = found if total is None else total + found
        progress(Progress(what="comparing probabilities", done=done, total=len(small), unit="cases"))
    return None if total is None else summarise(total)
