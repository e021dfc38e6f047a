"""The epochs of one student, or of several on the same batches."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

import numpy as np
import torch

from fastnnunet.errors import BuildError, SpecError
from fastnnunet.nnunet.trainer.distributed import least_of_processes
from fastnnunet.nnunet.trainer.norms import PRECISE_BATCHES, START_BATCHES, measure
from fastnnunet.nnunet.trainer.trainer import StudentTrainer

WARM_STEPS = 8  # more than the loaders keep ready
log = logging.getLogger(__name__)

StepReport = Callable[[int, int, dict[str, float], list[float]], None]


def run_epochs(trainers: Sequence[StudentTrainer], report: StepReport | None = None) -> None:
    """Train every trainer from its `current_epoch` to its `num_epochs` and write its checkpoint_final.pth.

    All see the same batches, which are loaded and augmented once: those that the first would see alone, so training
    together changes no student. One that has done an epoch already waits for the others. `report` gets (number of the
    trainer, iteration in this epoch, losses, pseudo Dice of its last epoch) after every step.

    A training for some hours learns from its first epoch how many fit (`planned_epochs`); a plan is made once, also for
    those that go on from a checkpoint.

    Raises SpecError when the trainers want different batches, BuildError when loss, gradient or weights of one are no
    longer finite; the checkpoints of earlier epochs stay.
    """
    _require_same_batches(trainers)
    for planned in [t for t in trainers if t.hours is not None and t.is_planned][:1]:
        for trainer in trainers:
            trainer.plan(planned.num_epochs)
    began = monotonic()
    pseudo_dice: list[list[float]] = [[] for _ in trainers]
    leader = min(trainers, key=lambda t: t.current_epoch)
    followers = [t for t in trainers if t is not leader]
    for trainer in (leader, *followers):
        trainer.start(load=trainer is leader)
    try:
        fresh = [t for t in trainers if t.current_epoch == 0 and not t.knows_statistics]
        measure(fresh, leader.batches_to_measure(), START_BATCHES)
        while (epoch := leader.current_epoch) < leader.num_epochs:
            leader.renew_loaders()
            active = [n for n, t in enumerate(trainers) if t.current_epoch == epoch]
            for n in active:
                trainers[n].on_epoch_start()
                trainers[n].on_train_epoch_start()
            losses: list[list[dict[str, float]]] = [[] for _ in trainers]
            ends = [monotonic()]  # of the steps
            for iteration in range(leader.num_iterations_per_epoch):
                batch = next(leader.dataloader_train)
                if leader.online is not None and leader.online.is_due(epoch, leader.num_epochs):
                    batch = leader.online.answered(batch)
                for n in active:
                    losses[n].append(step := trainers[n].train_step(batch, iteration))
                    _require_finite(trainers[n], step, iteration, batch["keys"])
                    if report is not None:
                        report(n, iteration + 1, step, pseudo_dice[n])
                ends.append(monotonic())
            for n in active:
                if not all(bool(torch.isfinite(p).all()) for p in trainers[n].network.parameters()):
                    raise _diverged(trainers[n], "weights became nan or inf", iteration)
                trainers[n].on_train_epoch_end(losses[n])
            if epoch == leader.num_epochs - 1:
                precise = [trainers[n] for n in active if trainers[n].norm_statistics == "precise"]
                measure(precise, leader.dataloader_train, PRECISE_BATCHES)
            _validate_epoch(leader, [trainers[n] for n in active])
            if not leader.is_planned:
                _plan(trainers, planned_epochs(leader, began, ends, monotonic()))
            for n in active:
                pseudo_dice[n] = [float(d) for d in trainers[n].logger.get_value("dice_per_class_or_region", step=-1)]
                trainers[n].on_epoch_end()
        for trainer in trainers:
            trainer.finish()
    finally:
        leader.stop_loaders()
        for trainer in trainers:
            trainer.close()


def planned_epochs(trainer: StudentTrainer, began: float, ends: Sequence[float], now: float) -> int:
    """How many epochs fit into the hours that `began`, the first of them included; times in seconds of one clock.

    An epoch takes what its steps take once loaders and networks are warm, `ends` of the first epoch's steps, the first
    entry their start, and its validation up to `now`. The slowest of several processes decides.
    """
    steps = len(ends) - 1
    warm = min(WARM_STEPS, steps // 2)
    epoch_s = (ends[-1] - ends[warm]) / (steps - warm) * steps + now - ends[-1]
    hours = trainer.hours or 0.0
    more = max(0, int((began + 3600 * hours - now) / max(epoch_s, 1e-9)))
    if more == 0:
        log.warning(
            "the first epoch took the whole %g hours and is the last; give more --hours or fewer --iterations", hours
        )
    else:
        log.info("%d epochs of %.0f s fit into %g hours", 1 + more, epoch_s, hours)
    return 1 + more


def _plan(trainers: Sequence[StudentTrainer], epochs: int) -> None:
    epochs = least_of_processes(epochs, trainers[0].device)
    for trainer in trainers:
        trainer.plan(epochs)


def _validate_epoch(leader: StudentTrainer, active: Sequence[StudentTrainer]) -> None:
    with torch.no_grad():
        for trainer in active:
            trainer.on_validation_epoch_start()
        outputs: list[list[object]] = [[] for _ in active]
        for _ in range(leader.num_val_iterations_per_epoch):
            batch = next(leader.dataloader_val)
            for trainer, its_outputs in zip(active, outputs, strict=True):
                its_outputs.append(trainer.validation_step(batch))
        for trainer, its_outputs in zip(active, outputs, strict=True):
            trainer.on_validation_epoch_end(its_outputs)


def _require_same_batches(trainers: Sequence[StudentTrainer]) -> None:
    """What a batch is made of has to be the same for students that share it."""
    first, *others = trainers
    wanted = first.batch_description()
    for other in others:
        different = [f"{k}: {wanted[k]} and {v}" for k, v in other.batch_description().items() if v != wanted[k]]
        if different:
            raise SpecError(
                f"{first.plans_manager.plans_name} and {other.plans_manager.plans_name} cannot be trained together, "
                f"their batches differ: {'; '.join(different)}\ntrain them one after the other"
            )


def _require_finite(trainer: StudentTrainer, step: dict[str, float], iteration: int, cases: Sequence[str]) -> None:
    for name in ("loss", "gradient"):
        if not np.isfinite(step[name]):
            raise _diverged(trainer, f"the {name} became {step[name]}", iteration, cases)


def _diverged(trainer: StudentTrainer, what: str, iteration: int, cases: Sequence[str] = ()) -> BuildError:
    folder = Path(trainer.output_folder)
    kept = [n for n in ("checkpoint_latest.pth", "checkpoint_best.pth") if os.path.isfile(folder / n)]
    state = f"the last good checkpoint is {folder / kept[0]}" if kept else "no checkpoint yet"
    batch = f" (cases {', '.join(map(str, cases))})" if cases else ""
    return BuildError(  # counted from 1, as the progress line does
        f"{what} in epoch {trainer.current_epoch + 1} of {trainer.num_epochs}, iteration {iteration + 1} of "
        f"{trainer.num_iterations_per_epoch}{batch}, of {trainer.plans_manager.plans_name}\n"
        f"{state}; start over with a lower learning rate (--lr) or --precision fp32"
    )
