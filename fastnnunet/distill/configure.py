"""A trainer for one student: nnU-Net's, with the settings and first weights of a job."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastnnunet.distill.job import TrainingJob, provenance
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.engines.labelling import resolve_precision
from fastnnunet.nnunet.files.cascade import previous_folder
from fastnnunet.nnunet.files.checkpoint import Weights, load_pretrained
from fastnnunet.nnunet.files.plans import configuration_of, label_manager_of

if TYPE_CHECKING:
    from fastnnunet.nnunet.trainer.mixing import Unlabelled
    from fastnnunet.nnunet.trainer.trainer import StudentTrainer

log = logging.getLogger(__name__)


def configure(
    job: TrainingJob,
    plans: dict[str, Any],
    dataset_json: dict[str, Any],
    soft_labels: CachedSoftLabels | None,
    resume: bool,
    device: str,
    start_weights: Callable[[], Weights],
    unlabelled: "Unlabelled | None" = None,
) -> "StudentTrainer":
    from fastnnunet.distill.losses import DistillationObjective
    from fastnnunet.nnunet.augment.last_patch import LastPatch
    from fastnnunet.nnunet.quiet import nnunet_quiet
    from fastnnunet.nnunet.trainer.make import make_trainer

    spec = job.distill
    trainer = make_trainer(plans, job.teacher.configuration, job.fold, dataset_json, device, resume)
    plans_manager, _ = configuration_of(plans, job.teacher.configuration)
    if not job.alone and (previous := previous_folder(job.teacher, plans)) is not None:
        trainer.folder_with_segs_from_previous_stage = str(previous)
    trainer.num_epochs, trainer.hours = spec.epochs, spec.hours
    trainer.num_iterations_per_epoch = spec.iterations_per_epoch
    trainer.num_val_iterations_per_epoch = spec.val_iterations_per_epoch
    trainer.initial_lr = spec.lr if spec.initial_lr is not None or trainer.network_lr is None else trainer.network_lr
    trainer.optimizer_name = spec.optimizer
    trainer.seed = spec.seed
    trainer.save_every = 1  # students are small; a kill costs one epoch at most
    trainer.store_mirroring = spec.mirroring
    trainer.augmentation = spec.augmentation
    trainer.mirror_augmentation = spec.mirror_augmentation
    trainer.norm_statistics = spec.norm_statistics
    trainer.knows_statistics = job.pretrained is not None
    if spec.last_patch is not None:
        trainer.last_patch = LastPatch(spec.last_patch, spec.last_share)
    on_device = {"auto": device.startswith("cuda"), "device": True, "loader": False}
    trainer.augment_on_device = on_device[job.augment_on]
    trainer.bf16 = device == "cpu" and resolve_precision(spec.precision) == "bf16"
    trainer.soft_labels = soft_labels
    trainer.unlabelled = unlabelled
    trainer.soft_on_ignored = spec.soft_on_ignored
    if soft_labels is not None:
        regions = bool(label_manager_of(plans_manager, dataset_json).has_regions)
        trainer.objective = DistillationObjective.of(spec, regions=regions)
    trainer.provenance = provenance(job, soft_labels.key if soft_labels is not None else None)
    if unlabelled is not None:
        trainer.provenance["unlabelled_cache_key"] = unlabelled.key
    with nnunet_quiet():
        trainer.initialize()
    if trainer.device_augmentation is not None:  # as a setting it may be `auto`, and other bits come of it
        trainer.provenance["augmented_on"] = "device"
    if job.pretrained is not None and not resume:
        load_pretrained(trainer.plain_network, job.pretrained)
    elif spec.start == "teacher" and not resume:
        _start_from_teacher(trainer, job, start_weights())
    return trainer


def _start_from_teacher(trainer: "StudentTrainer", job: TrainingJob, weights: Weights) -> None:
    """First weights from the teacher's model of the student's own fold, or its first."""
    from fastnnunet.nnunet.student.inherit import inherit_weights

    share = inherit_weights(trainer.plain_network, weights)
    if share == 0:
        log.info("student %s starts from random weights: its network has no layers of the teacher's", job.student.tag)
    elif share < 1:
        log.info("student %s takes %.0f %% of its first weights from the teacher", job.student.tag, 100 * share)
