"""Seconds per training step: bare, with loaders and soft labels or labels alone, several students, teachers online.

All are measured in turns in one run, `rounds` times, and their medians compared:
bare            a step on batches in memory, no loader running: forward, backward, clipping, optimiser
soft, hard      the training loop with its loaders, soft labels from the cache or labels alone
online          `hard`, and every step runs all teachers once on the augmented patch for the soft label
online_as_cached  the same with the mirrors of the cache's recipe: the soft label that the cache holds
together        all students on the same batches, against the sum of their bare steps

Only the loaders of the arm that is timed run, and the first steps of an arm, which take batches that were made while
the loop was starting, are not timed. Runs are written into a temporary nnUNet_results that links to the teacher.

With `--loss` the record also compares, on unaugmented patches, KL from the cache with that from the cache's own
teachers run online on the same cases; their gradients must agree within T * eps, where eps is the error bound of the
store.

Example:

    python -m pipelines.measure.train.step_speed -d 4 --cache-root DIR -o record.json
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `fastnnunet train` sets it, before OpenMP starts

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from scipy.special import softmax

from fastnnunet.distill.check import check_job, resolve_device
from fastnnunet.distill.configure import configure
from fastnnunet.distill.job import TrainingJob, start_fold
from fastnnunet.distill.memory import keep_freed_memory
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.nnunet.files.model import model_folder_of
from fastnnunet.nnunet.files.paths import teacher_folder
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from fastnnunet.teachers.jobs import cache_for_training
from pipelines.measure.head import header, put, training_arguments

RESULTS = "nnUNet_results"


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
    files = model_folder_of(job.teacher)
    plans, dataset_json, _ = check_job(job, resume=False, overwrite=True, files=files)
    start_weights = partial(files.take_weights, start_fold(job))
    return configure(job, plans, dataset_json, soft, False, resolve_device(job.device), start_weights)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


WARM = 8  # more than the loaders keep ready
WARM_ONLINE = 2  # loaders are never late beside teachers


def stop_loaders(trainer: Any) -> None:
    """End the loader processes of a trainer that was started."""
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()


def looped(trainers: list[Any], steps: int, teachers: Callable[[np.ndarray], np.ndarray] | None = None) -> list[float]:
    """Seconds of each step of the loop of `trainers`; with `teachers` the soft label is made from the images."""
    leader, warm = trainers[0], WARM if teachers is None else WARM_ONLINE
    for trainer in trainers:
        trainer.start(load=trainer is leader)
        trainer.network.train()
    seconds = []
    try:
        for number in range(warm + steps):
            start = time.perf_counter()
            batch = next(leader.dataloader_train)
            if teachers is not None:
                batch["target"].append(torch.from_numpy(teachers(batch["data"].cpu().numpy())))
            for trainer in trainers:
                trainer.train_step(batch, number)
            synchronize()
            seconds.append(time.perf_counter() - start)
    finally:
        stop_loaders(leader)
        for trainer in trainers:
            trainer.close()
    return seconds[warm:]


def bare(trainer: Any, batches: list[Any], steps: int) -> list[float]:
    """Seconds of each step on batches in memory."""
    trainer.network.train()
    seconds = []
    for number in range(2 + steps):
        start = time.perf_counter()
        trainer.train_step(batches[number % len(batches)], number)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def batches_of(trainer: Any, count: int) -> list[Any]:
    """Batches made by the trainer's own loaders, which are stopped again."""
    trainer.start(load=True)
    try:
        return [next(trainer.dataloader_train) for _ in range(count)]
    finally:
        stop_loaders(trainer)
        trainer.close()


class OnlineLabels:
    """Stands for a cache where the soft label comes from teachers in the loop: the batch has none yet."""

    def __init__(self, num_channels: int) -> None:
        self.num_channels = num_channels


def online_trainer(trainer: Any, objective: Any, num_channels: int) -> Any:
    """`trainer`, whose loaders then load labels only and whose steps take a soft label."""
    loaders = trainer.get_dataloaders

    def without_soft_labels() -> Any:
        trainer.soft_labels = None
        try:
            return loaders()
        finally:
            trainer.soft_labels = OnlineLabels(num_channels)

    trainer.get_dataloaders = without_soft_labels
    trainer.objective = objective
    return trainer


def teacher_labels(teacher: Any, folds: tuple[Any, ...], temperature: float) -> Callable[[np.ndarray], np.ndarray]:
    """Images (N, C, patch) -> stored channels (N, S, patch) of softmax(mean logits of all folds and mirrors / T)."""

    def labels(images: np.ndarray) -> np.ndarray:
        out = []
        for image in images:
            ((_, mean),) = teacher.blocks(image, folds, image.shape[1:])
            out.append(softmax(mean / temperature, 0)[1:])
        return np.stack(out).astype(np.float32)

    return labels


def loss_check(job: TrainingJob, soft: CachedSoftLabels, trainer: Any, cases: int) -> dict[str, Any]:
    """KL from the cache against KL from the cache's own teachers, run online on the same unaugmented cases.

    The store says |p' - p| <= eps for every stored channel, so that the part of the objective that depends on logits,
    T^2 times the cross entropy of p' and q, moves by at most T^2 * eps * sum |log q - log q_0|: of the order T * eps
    per unit of logit, which is the bound on its gradient. Both are recorded.
    """
    source, factory, _ = open_teacher(job.teacher, job.cache)
    teacher, temperature = factory.load(torch.get_num_threads()), job.distill.temperature
    objective = replace(trainer.objective, dice=False)
    rows = []
    for case in source.case_ids[:cases]:
        image = source.image_CZYX(case)
        logits = np.concatenate([b for _, b in teacher.blocks(image, job.teacher.folds, image.shape[1:])], 1)
        exact = torch.from_numpy(softmax(logits / temperature, 0)[None, 1:].astype(np.float32))
        stored = torch.from_numpy(soft.read(case, (0, 0, 0), image.shape[1:])[None])
        padding = [(0, -n % 8) for n in image.shape[1:]]
        with torch.inference_mode():
            outputs = trainer.network.eval()(torch.from_numpy(np.pad(image, [(0, 0), *padding]))[None])
        finest = (outputs[0] if isinstance(outputs, list | tuple) else outputs)[:, :, *map(slice, image.shape[1:])]
        z = finest.float().clone().requires_grad_()
        losses, gradients = [], []
        for target in (exact, stored):
            _, loss = objective(torch.zeros(()), z, target)
            (gradient,) = torch.autograd.grad(loss, z)
            losses.append(loss.item())
            gradients.append(gradient * z[0, 0].numel())  # of one voxel, since the loss is their mean
        rows.append(
            {
                "case": case,
                "online": losses[0],
                "cached": losses[1],
                "gradient_difference": float((gradients[0] - gradients[1]).abs().max()),
                "probability_difference": float((exact - stored).abs().max()),
            }
        )
    return {
        "cases": rows,
        "largest_loss_difference": max(abs(r["online"] - r["cached"]) for r in rows),
        "largest_gradient_difference": max(r["gradient_difference"] for r in rows),
        "temperature_times_eps": temperature / 255,
    }


def measure(job: TrainingJob, sizes: tuple[int, ...], rounds: int, steps: int, loss_cases: int = 0) -> dict[str, Any]:
    """The record. The first of `sizes` is the student of every measurement but `together`."""
    cache = cache_for_training(job.teacher, job.cache, job.cache_root)
    soft = CachedSoftLabels(cache, job.distill.temperature)
    threads = job.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    if resolve_device(job.device) == "cpu":
        keep_freed_memory()  # as a training does
    jobs = {r: replace(job, student=replace(job.student, r=r)) for r in sizes}
    first = jobs[sizes[0]]
    control = replace(first, distill=replace(job.distill, alpha=0.0))
    with temporary_results(job.teacher):
        trainer = make_trainer(first, soft)
        batches = batches_of(trainer, 3)
        recipes = {"online": replace(job.cache, mirroring=False), "online_as_cached": job.cache}
        teachers = {
            name: teacher_labels(
                open_teacher(job.teacher, recipe)[1].load(threads), job.teacher.folds, job.distill.temperature
            )
            for name, recipe in recipes.items()
        }

        def online(name: str) -> list[float]:
            learner = online_trainer(make_trainer(control, None), trainer.objective, soft.num_channels)
            return looped([learner], max(2, steps // 4), teachers[name])

        arms: dict[str, Callable[[], list[float]]] = {
            f"bare_r{r}": lambda r=r: bare(make_trainer(jobs[r], soft), batches, steps) for r in sizes
        }
        arms |= {
            "soft": lambda: looped([make_trainer(first, soft)], steps),
            "hard": lambda: looped([make_trainer(control, None)], steps),
            "online": lambda: online("online"),
            "online_as_cached": lambda: online("online_as_cached"),
            "together": lambda: looped([make_trainer(j, soft) for j in jobs.values()], steps),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, arm in arms.items():
                seconds[name] += arm()
        loss = loss_check(job, soft, trainer, loss_cases) if loss_cases else None
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **header("seconds per training step, medians"),
        "device": str(trainer.device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "load_average": list(os.getloadavg()),
        "loader_processes": get_allowed_n_proc_DA(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "family": "lite" if first.student.is_lite else "width",
        "sizes": list(sizes),
        "rounds": rounds,
        "steps_per_round": steps,
        "median_s": median,
        "online_over_soft": median["online"] / median["soft"],
        "online_as_cached_over_soft": median["online_as_cached"] / median["soft"],
        "soft_over_hard": median["soft"] / median["hard"],
        "soft_over_bare": median["soft"] / median[f"bare_r{sizes[0]}"],
        "together_over_sum_of_bare": median["together"] / sum(median[f"bare_r{r}"] for r in sizes),
        "loss": loss,
        "seconds": seconds,
    }


if __name__ == "__main__":
    parser = training_arguments(__doc__)
    parser.add_argument("-r", type=int, nargs="+", default=[4, 2, 6])
    parser.add_argument("--family", default="auto", help="of the students: auto, width or lite")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--loss", type=int, default=5, help="cases of the loss check")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    training = TrainingJob(
        teacher=TeacherSpec(dataset=args.d, configuration=args.c),
        student=StudentSpec(r=args.r[0], family=args.family),
        distill=DistillSpec(),
        cache=CacheSpec(),
        fold=args.f,
        device=args.device,
        threads=args.threads,
        cache_root=args.cache_root,
    )
    record = measure(training, tuple(args.r), args.rounds, args.steps, args.loss)
    put(record, args.o)
    for arm, value in record["median_s"].items():
        print(f"{arm:16} {1000 * value:9.1f} ms")
    for ratio in (name for name in record if "_over_" in name):
        print(f"{ratio:26} {record[ratio]:.3f}")
