"""CPU seconds per sample of a batch: nnU-Net's loader without soft labels, and this package's without and with them.

One process makes whole batches, loading and augmentation together, in turns, `rounds` times; medians. Loaders are given
the same seeds, so that all make the same samples but for the soft label; the record says whether they did.

Example:

    python -m pipelines.measure.train.loader_speed -d 4 -c 3d_fullres --cache-root DIR -o record.json
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5

from fastnnunet.distill.job import TrainingJob
from fastnnunet.distill.soft_labels import CachedSoftLabels
from fastnnunet.nnunet.trainer.loaders.ordered import ordered_batches
from fastnnunet.nnunet.trainer.seeds import TRAINING, BatchNumber
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import cache_for_training
from pipelines.measure.head import header, put, training_arguments
from pipelines.measure.train.step_speed import make_trainer, temporary_results


class NnUNetsBatches:
    """nnU-Net's own loader, seeded as this package seeds."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._oversamples = loader, loader.get_do_oversample
        self._number = BatchNumber(0, 0, 0)
        loader.get_do_oversample = self._begin_sample  # what it asks first for each sample

    def _begin_sample(self, place: int) -> bool:
        self._number.begin(place)
        return bool(self._oversamples(place))

    def make(self, number: BatchNumber, _is_loading: Callable[[str], None]) -> dict[str, Any]:
        """The batch of a number."""
        self._number = number
        number.begin()
        return dict(next(self._loader))


def nnunets_batches(trainer: Any, seed: int) -> Any:
    """Batches of nnU-Net's own loader with its own transforms."""
    own = nnUNetTrainerDA5 if trainer.augmentation == "da5" else nnUNetTrainer
    trainer.get_training_transforms = own.get_training_transforms
    loader = NnUNetsBatches(nnUNetTrainer.get_dataloaders(trainer)[0].data_loader)
    return ordered_batches(loader, seed=seed, stream=TRAINING, start=0, num_processes=0, pin_memory=False)


def measure(job: TrainingJob, rounds: int, batches: int) -> dict[str, Any]:
    """The record."""
    soft = CachedSoftLabels(cache_for_training(job.teacher, job.cache, job.cache_root), job.distill.temperature)
    torch.set_num_threads(1)
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112 - nnU-Net's name, read where loaders are made
    with temporary_results(job.teacher):
        trainers = {
            name: make_trainer(job, labels) for name, labels in (("nnunet", None), ("hard", None), ("soft", soft))
        }
        loaders = {"nnunet": nnunets_batches(trainers["nnunet"], job.distill.seed)}
        loaders |= {name: trainers[name].get_dataloaders()[0] for name in ("hard", "soft")}
        warm = {name: next(loader) for name, loader in loaders.items()}
        difference = max(float((warm["nnunet"]["data"] - warm[name]["data"]).abs().max()) for name in ("hard", "soft"))
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, loader in loaders.items():
                start = time.process_time()
                for _ in range(batches):
                    next(loader)
                seconds[name].append((time.process_time() - start) / batches / trainers[name].batch_size)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **header("CPU seconds per sample, medians"),
        "configuration": job.teacher.configuration,
        "augmentation": job.distill.augmentation,
        "batch_size": trainers["soft"].batch_size,
        "rounds": rounds,
        "batches_per_round": batches,
        "largest_difference_of_images": difference,
        "median_s": median,
        "hard_over_nnunet": median["hard"] / median["nnunet"],
        "soft_over_nnunet": median["soft"] / median["nnunet"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    parser = training_arguments(__doc__)
    parser.add_argument("--augmentation", default="default", choices=["default", "da5"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=10)
    args = parser.parse_args()
    record = measure(
        TrainingJob(
            teacher=TeacherSpec(dataset=args.d, configuration=args.c),
            student=StudentSpec(r=4),
            distill=DistillSpec(augmentation=args.augmentation),
            cache=CacheSpec(),
            fold=args.f,
            device="cpu",
            cache_root=args.cache_root,
        ),
        args.rounds,
        args.batches,
    )
    put(record, args.o)
    for arm, value in record["median_s"].items():
        print(f"{arm:8} {1000 * value:7.2f} ms")
    print(f"hard / nnunet {record['hard_over_nnunet']:.3f}   soft / nnunet {record['soft_over_nnunet']:.3f}")
