"""The teacher's labels of the scans, out of its cache: in the preprocessed cases, and on the grids of the scans."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.storage import Place
from fastnnunet.events import Listener, ignore
from fastnnunet.nnunet.files.cases import PreprocessedCases
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.nnunet.unlabelled.parallel import finish_each
from fastnnunet.nnunet.unlabelled.teacher_labels import (
    is_labelled,
    remove_leftovers,
    write_labelled,
    write_scan_label,
)
from fastnnunet.teachers.images import reader_at_any

LEAST = 0.5 / 255  # what a stored probability of 0 stands for, as a logit


@dataclass(frozen=True, slots=True, kw_only=True)
class _LabelTask:
    """One case, for any process."""

    cache: Place
    key: str
    images: PreprocessedCases
    case_id: str
    folder: Path
    file: Path
    files: ModelFolder


def write_labels(
    cache: Place,
    images: PreprocessedCases,
    files: ModelFolder,
    folder: Path,
    labels_folder: Path,
    processes: int = 0,
    progress: Listener = ignore,
) -> None:
    """Write the labels of every case of the cache: into preprocessed cases in `folder`, as maps into `labels_folder`.

    What is there already of this cache is kept. Raises CorruptError when the cache is damaged, DiskSpaceError,
    BuildError.
    """
    key = SoftLabelReader(cache).key
    remove_leftovers(folder, images.case_ids)
    tasks = {}
    for case in images.case_ids:
        file = labels_folder / f"{case}{files.dataset_json['file_ending']}"
        if not (file.is_file() and is_labelled(images, case, folder, key)):
            tasks[case] = _LabelTask(
                cache=cache, key=key, images=images, case_id=case, folder=folder, file=file, files=files
            )
    finish_each(_write, tasks, processes, "writing labels", "labels of {} cannot be written", progress)


def _write(task: _LabelTask) -> None:
    model = task.files.model
    task.file.unlink(missing_ok=True)  # the map comes last, and says that both are there
    reader = reader_at_any(task.cache)
    probabilities = reader.to_probabilities(reader.read_case(task.case_id))
    label_ZYX = model.labels.convert_probabilities_to_segmentation(probabilities)
    write_labelled(task.images, task.case_id, task.folder, label_ZYX, task.key, model)
    temperature = reader.temperature or reader.cache.spec.temperature
    logits = as_logits(probabilities, temperature, regions=model.has_regions)
    del probabilities, label_ZYX  # resampling needs the room
    write_scan_label(task.images, task.case_id, task.file, logits, model)


def as_logits(probabilities: np.ndarray, temperature: float, *, regions: bool) -> np.ndarray:
    """Logits float32 (heads, Z, Y, X) with these soft labels, up to what all classes of a voxel have in common.

    nnU-Net resamples logits, not probabilities, and what is common to all classes stays so when they are resampled.
    """
    logits: np.ndarray = np.log(np.maximum(probabilities, np.float32(LEAST)))
    if regions:
        logits -= np.log(np.maximum(1 - probabilities, np.float32(LEAST)))
    logits *= np.float32(temperature)
    return logits
