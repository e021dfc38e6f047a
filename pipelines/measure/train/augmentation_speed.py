"""Samples per second: augmentation on the device against augmentation in nnU-Net's loader processes.

All are measured in turns in one run, `rounds` times, and their medians compared:
loader, device        batches alone: loaded, augmented and on the device
loader_loop, device_loop   the training loop: the same, and a step of the student on each batch
device_alone          augmentation on the device of samples that lie in its memory, drawn and cropped beforehand
bare                  a step on a batch in memory

`peak_bytes` is the most memory of the GPU that augmentation alone took. Nothing is written beside the teacher.

Example:

    python -m pipelines.measure.train.augmentation_speed -d 4 -c 3d_fullres --device cuda -o record.json
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `fastnnunet train` sets it, before OpenMP starts

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from fastnnunet.distill.job import TrainingJob
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.augment.batches import AugmentedBatches
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import cache_for_training
from pipelines.measure.head import header, put, training_arguments
from pipelines.measure.train.step_speed import (
    WARM,
    bare,
    batches_of,
    looped,
    make_trainer,
    stop_loaders,
    synchronize,
    temporary_results,
)


def loaded(trainer: Any, steps: int) -> list[float]:
    """Seconds from one augmented batch on the device to the next."""
    trainer.start(load=True)
    seconds = []
    try:
        for _ in range(WARM + steps):
            start = time.perf_counter()
            batch = next(trainer.dataloader_train)
            trainer._to_device([batch["data"], *batch["target"]])
            synchronize()
            seconds.append(time.perf_counter() - start)
    finally:
        stop_loaders(trainer)
        trainer.close()
    return seconds[WARM:]


def drawn_batches(trainer: Any, count: int) -> list[dict[str, Any]]:
    """Batches as the loader processes hand them over, moved to the device."""
    trainer.start(load=True)
    try:
        batches = [next(trainer.dataloader_train._batches) for _ in range(count)]
    finally:
        stop_loaders(trainer)
        trainer.close()
    return [{**b, "data": trainer._to_device(b["data"]), "target": trainer._to_device(b["target"])} for b in batches]


def augmented(trainer: Any, batches: list[dict[str, Any]]) -> list[float]:
    """Seconds for each of these batches; one more, the first, is not timed."""
    ready = AugmentedBatches(
        iter([*batches[:1], *batches]), trainer.device_augmentation, trainer.device, trainer.stacked_channels
    )
    next(ready)
    seconds = []
    for _ in batches:
        synchronize()
        start = time.perf_counter()
        next(ready)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(job: TrainingJob, rounds: int, steps: int) -> dict[str, Any]:
    """The record."""
    soft = None
    if job.distill.alpha > 0:
        soft = CachedSoftLabels(cache_for_training(job.teacher, job.cache, job.cache_root), job.distill.temperature)
    torch.set_num_threads(job.threads or torch.get_num_threads())
    jobs = {where: replace(job, augment_on=where) for where in ("loader", "device")}
    with temporary_results(job.teacher):
        trainer = make_trainer(jobs["device"], soft)
        if trainer.device_augmentation is None:
            raise MismatchError(
                "this training is not augmented on the device (see the log): there is nothing to compare"
            )
        drawn, ready = drawn_batches(trainer, steps), batches_of(trainer, 3)
        arms: dict[str, Callable[[], list[float]]] = {}
        for where, of in jobs.items():
            arms[where] = lambda of=of: loaded(make_trainer(of, soft), steps)
            arms[f"{where}_loop"] = lambda of=of: looped([make_trainer(of, soft)], steps)
        arms["device_alone"] = lambda: augmented(trainer, drawn)
        arms["bare"] = lambda: bare(make_trainer(job, soft), ready, steps)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, arm in arms.items():
                seconds[name] += arm()
        peak_bytes = None
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            augmented(trainer, drawn)
            peak_bytes = torch.cuda.max_memory_allocated() - before
    median = {name: statistics.median(values) for name, values in seconds.items()}
    per_second = {name: trainer.batch_size / statistics.fmean(values) for name, values in seconds.items()}
    return {
        **header("samples per second: augmentation on the device, and in the loader processes"),
        "device": str(trainer.device),
        "gpu": torch.cuda.get_device_name() if trainer.device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "loader_processes": get_allowed_n_proc_DA(),
        "configuration": job.teacher.configuration,
        "patch_size": list(trainer.configuration_manager.patch_size),
        "batch_size": trainer.batch_size,
        "student": job.student.tag,
        "soft_labels": soft is not None,
        "rounds": rounds,
        "steps_per_round": steps,
        "samples_per_s": per_second,
        "device_over_loader": per_second["device"] / per_second["loader"],
        "device_loop_over_loader_loop": per_second["device_loop"] / per_second["loader_loop"],
        "peak_bytes": peak_bytes,
        "median_s": median,
        "seconds": seconds,
    }


if __name__ == "__main__":
    parser = training_arguments(__doc__)
    parser.add_argument("-r", type=int, default=4)
    parser.add_argument(
        "-a", type=float, default=DistillSpec().alpha, help="0: without soft labels, and without a cache"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    training = TrainingJob(
        teacher=TeacherSpec(dataset=args.d, configuration=args.c),
        student=StudentSpec(r=args.r),
        distill=DistillSpec(alpha=args.a),
        cache=CacheSpec(),
        fold=args.f,
        device=args.device,
        threads=args.threads,
        cache_root=args.cache_root,
    )
    record = measure(training, args.rounds, args.steps)
    put(record, args.o)
    for arm, value in record["samples_per_s"].items():
        print(f"{arm:12} {value:9.1f} samples/s")
    for name in ("device_over_loader", "device_loop_over_loader_loop"):
        print(f"{name:28} {record[name]:.3f}")
