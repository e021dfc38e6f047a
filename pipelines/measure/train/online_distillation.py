"""Train a student with its teachers run in every step, on the augmented patch: what a cache replaces.

The student is written into nnUNet_results like any other, its checkpoint says `online`, and the table of
`pipelines.measure.train.student_table` shows it beside students of a cache of the same folds without mirroring:

    fastnnunet cache build -d 4 -f 0 --spec cache_specs/no_mirroring.yaml
    fastnnunet train -d 4 -f 0 -tf 0 --spec cache_specs/no_mirroring.yaml -r 4 --seed 0 ...
    python -m pipelines.measure.train.online_distillation -d 4 -f 0 -tf 0 -r 4 --seed 0 ...

with nnUNet_results naming another folder for the last command, since both runs have the same name.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastnnunet.distill.job import TrainingJob, run_folder
from fastnnunet.distill.losses import DistillationObjective
from fastnnunet.distill.train import _seed_everything
from fastnnunet.nnunet.trainer.epochs import run_epochs
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from pipelines.measure.train.step_speed import make_trainer, online_trainer, teacher_labels
from pipelines.measure.train.student_table import ONLINE


def train_online(job: TrainingJob) -> Path:
    """Train `job` without a cache; classes only, no regions. Returns its fold folder."""
    spec = job.distill
    factory = open_teacher(job.teacher, replace(job.cache, mirroring=False))[1]
    labels = teacher_labels(factory.load(torch.get_num_threads()), job.teacher.folds, spec.temperature)
    objective = DistillationObjective.of(spec, regions=False)
    _seed_everything(spec.seed)  # the same first weights as a student from the cache has
    trainer = online_trainer(make_trainer(job, None), objective, factory.num_heads - 1)
    trainer.provenance = {**trainer.provenance, ONLINE: True}
    step, validate = trainer.train_step, trainer.validation_step

    def train_step(batch: dict[str, Any], iteration: int = 0) -> dict[str, float]:
        batch["target"].append(torch.from_numpy(labels(batch["data"].numpy())))
        return step(batch, iteration)

    def validation_step(batch: dict[str, Any]) -> Any:
        soft, trainer.soft_labels = trainer.soft_labels, None  # these batches have none
        try:
            return validate(batch)
        finally:
            trainer.soft_labels = soft

    trainer.train_step, trainer.validation_step = train_step, validation_step

    def report(_: int, iteration: int, losses: dict[str, float], __: list[float]) -> None:
        if iteration == trainer.num_iterations_per_epoch:
            values = f"hard {losses['hard']:+.3f} soft {losses['soft']:.3f}"
            print(f"epoch {trainer.current_epoch + 1}/{trainer.num_epochs} {values}", flush=True)

    run_epochs([trainer], report)
    return run_folder(job)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True)
    parser.add_argument("-c", default="3d_fullres")
    parser.add_argument("-f", type=int, default=0)
    parser.add_argument("-tf", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("-r", type=int, default=4)
    parser.add_argument("-a", type=float, default=DistillSpec().alpha)
    parser.add_argument("-temp", type=float, default=DistillSpec().temperature)
    parser.add_argument("--loss", choices=["kl", "kl_dice"], default=DistillSpec().loss)
    parser.add_argument(
        "--soft-deep-supervision", action=argparse.BooleanOptionalAction, default=DistillSpec().soft_deep_supervision
    )
    parser.add_argument("-e", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    distill = DistillSpec(
        alpha=args.a,
        temperature=args.temp,
        loss=args.loss,
        soft_deep_supervision=args.soft_deep_supervision,
        epochs=args.e,
        iterations_per_epoch=args.iterations,
        val_iterations_per_epoch=1,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        seed=args.seed,
    )
    folder = train_online(
        TrainingJob(
            teacher=TeacherSpec(dataset=args.d, configuration=args.c, folds=tuple(args.tf)),
            student=StudentSpec(r=args.r),
            distill=distill,
            cache=CacheSpec(),
            fold=args.f,
            threads=args.threads,
        )
    )
    print(folder)
