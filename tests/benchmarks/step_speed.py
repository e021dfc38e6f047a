"""Seconds per training step: bare, with loaders and soft labels or labels alone, several students, teachers online.

All are measured in turns in one run, `rounds` times, and their medians compared:
bare            forward, backward and optimiser step of the first student on one batch in memory
soft, hard      the training loop with its loaders, soft labels from the cache or labels alone
online          `soft`, but every step runs all teachers on the augmented patch as well (no mirrors)
together        all students on the same batches, against the sum of their bare steps

Runs are written into a temporary nnUNet_results that links to the teacher.

Example:

    python -m tests.benchmarks.step_speed -d 4 --cache-root DIR -o record.json
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastnnunet.bench.record import hardware, now_utc, versions, write_json
from fastnnunet.distill.soft_labels import CachedSoftLabels, cache_for_training
from fastnnunet.distill.train import TrainingJob, _configure, check_job, resolve_device
from fastnnunet.nnunet.dataset import open_teacher
from fastnnunet.nnunet.paths import teacher_folder
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec

RESULTS, LOADERS = "nnUNet_results", "nnUNet_n_proc_DA"


@contextlib.contextmanager
def temporary_results(teacher: TeacherSpec) -> Iterator[None]:
    """nnUNet_results in a temporary folder that links to the teacher's, so that nothing is written beside it."""
    folder, before = teacher_folder(teacher).resolve(), os.environ[RESULTS]
    with tempfile.TemporaryDirectory() as root:
        link = Path(root) / folder.parent.name / folder.name
        link.parent.mkdir()
        link.symlink_to(folder)
        os.environ[RESULTS] = root  # read by nnU-Net whenever a path is joined
        try:
            yield
        finally:
            os.environ[RESULTS] = before


def make_trainer(job: TrainingJob, soft: CachedSoftLabels | None) -> Any:
    """A trainer of `job` that was not started."""
    plans, dataset_json, _ = check_job(job, resume=False, overwrite=True)
    return _configure(job, plans, dataset_json, soft, False, resolve_device(job.device))


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(steps: int, step: Any) -> list[float]:
    """Seconds of each of `steps` calls."""
    seconds = []
    for number in range(steps):
        start = time.perf_counter()
        step(number)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(job: TrainingJob, sizes: tuple[int, ...], rounds: int, steps: int) -> dict[str, Any]:
    """The record. The first of `sizes` is the student of every measurement but `together`.

    A round times `steps` steps of each arm; the loaders of the other arms are stopped meanwhile only by their full
    queues, so each arm first takes one step that is not timed.
    """
    cache = cache_for_training(job.teacher, job.cache, job.cache_root)
    soft = CachedSoftLabels(cache, job.distill.temperature)
    factory = open_teacher(job.teacher, replace(job.cache, mirroring=False))[1]
    threads = job.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    with temporary_results(job.teacher):
        students = {r: make_trainer(replace(job, student=StudentSpec(r=r)), soft) for r in sizes}
        hard = make_trainer(replace(job, distill=replace(job.distill, alpha=0.0)), None)
        first, *others = students.values()
        teacher = factory.load(threads)
        try:
            for trainer in (first, hard):
                trainer.start(load=True)
            for trainer in others:
                trainer.start(load=False)
            for trainer in (*students.values(), hard):
                trainer.network.train()
            batch = next(first.dataloader_train)

            def online(number: int) -> None:
                new = next(first.dataloader_train)
                for image in new["data"].numpy():
                    for fold in job.teacher.folds:
                        teacher.engine.logits(fold, image[None])
                first.train_step(new, number)

            def together(number: int) -> None:
                new = next(first.dataloader_train)
                for trainer in students.values():
                    trainer.train_step(new, number)

            arms = {f"bare_r{r}": (lambda n, t=t: t.train_step(batch, n)) for r, t in students.items()}
            arms |= {
                "soft": lambda n: first.train_step(next(first.dataloader_train), n),
                "hard": lambda n: hard.train_step(next(hard.dataloader_train), n),
                "online": online,
                "together": together,
            }
            seconds: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(rounds):
                for name, step in arms.items():
                    step(0)
                    seconds[name] += timed(steps, step)
        finally:
            for trainer in (first, hard):
                for loader in (trainer.dataloader_train, trainer.dataloader_val):
                    if hasattr(loader, "_finish"):
                        loader._finish()
            for trainer in (*students.values(), hard):
                trainer.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "what": "seconds per training step, medians",
        "created": now_utc(),
        "hardware": hardware(),
        "versions": versions(),
        "device": str(first.device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "loader_processes": os.environ.get(LOADERS),
        "sizes": list(sizes),
        "rounds": rounds,
        "steps_per_round": steps,
        "median_s": median,
        "online_over_soft": median["online"] / median["soft"],
        "soft_over_hard": median["soft"] / median["hard"],
        "soft_over_bare": median["soft"] / median[f"bare_r{sizes[0]}"],
        "together_over_sum_of_bare": median["together"] / sum(median[f"bare_r{r}"] for r in sizes),
        "seconds": seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", default="4")
    parser.add_argument("-c", default="3d_fullres")
    parser.add_argument("-f", type=int, default=0)
    parser.add_argument("-r", type=int, nargs="+", default=[4, 2, 6])
    parser.add_argument("--cache-root", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", type=Path, required=True)
    args = parser.parse_args()
    training = TrainingJob(
        teacher=TeacherSpec(dataset=args.d, configuration=args.c),
        student=StudentSpec(r=args.r[0]),
        distill=DistillSpec(),
        cache=CacheSpec(),
        fold=args.f,
        device=args.device,
        threads=args.threads,
        cache_root=args.cache_root,
    )
    record = measure(training, tuple(args.r), args.rounds, args.steps)
    write_json(args.o, record)
    for arm, value in record["median_s"].items():
        print(f"{arm:10} {1000 * value:9.1f} ms")
