"""Images without labels as a training takes them: preprocessed, with a complete cache, checked."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.cache.store.storage import Place
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.errors import SpecError
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.nnunet.files.plans import configuration_of, label_manager_of
from fastnnunet.nnunet.trainer.loading_errors import remake
from fastnnunet.nnunet.unlabelled.image_case import ENDINGS
from fastnnunet.nnunet.unlabelled.sets import require_current, require_other_images
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.images import open_images
from fastnnunet.teachers.jobs import find_for_training

if TYPE_CHECKING:
    from fastnnunet.nnunet.trainer.mixing import Unlabelled


def unlabelled_for_training(
    teacher: TeacherSpec,
    spec: CacheSpec,
    distill: DistillSpec,
    labelled: Mapping[str, str] | None,
    root: Place | None = None,
    spec_file: Path | None = None,
    files: ModelFolder | None = None,
) -> "Unlabelled":
    """The set that `distill` names and its complete cache, checked against its images, the data set and the teacher.

    `labelled`: digest of the preprocessed image of every labelled case; None where they are to be read for it.
    Raises NotFoundError (with the command that makes what is missing), MismatchError (images changed; names or images
    are those of labelled cases; no cache fits), SpecError (cascade; batch Dice in several processes), CorruptError.
    """
    from fastnnunet.nnunet.trainer import distributed
    from fastnnunet.nnunet.trainer.mixing import Unlabelled

    job = open_images(teacher, spec, None, distill.unlabelled, root, spec_file, files)
    cases = require_current(job.target, job.labelled, job.command)
    of_case = [str(cases.folder / f"<case>{ending}") for ending in ENDINGS]
    cases = replace(cases, remake=f"make it again with: {remake(of_case, job.command)}")
    manager, config = configuration_of(job.target.plans, teacher.configuration)
    ignores = label_manager_of(manager, job.target.dataset_json).has_ignore_label
    if (config.batch_dice or ignores) and not distill.pseudo_labels and distributed.share().world_size > 1:
        raise SpecError(
            "--unlabelled: with batch Dice or an ignore label several processes cannot join their losses when they "
            "have different numbers of labelled samples\nstart one process, without torchrun, or give --pseudo-labels"
        )
    cache_job = job.cache_job(cases)
    cache = find_for_training(cache_job)
    soft_labels = CachedSoftLabels(cache, spec.temperature)
    if labelled is None:
        job.refuse_labelled(cache_job)
    else:
        require_other_images(soft_labels.image_digests, labelled)
    foreground = job.target.foreground_folder(soft_labels.key)
    unlabelled = Unlabelled(
        cases=cases,
        foreground=foreground,
        soft_labels=soft_labels,
        key=soft_labels.key,
        share=distill.unlabelled_share,
        pseudo_labels=distill.pseudo_labels,
        command=job.command,
    )
    unlabelled.require_foreground(job.command)
    return unlabelled
