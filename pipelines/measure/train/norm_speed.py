"""Seconds per training step of a student with batch norm against the same with the teacher's norm.

instance        the teacher's norm
batch           batch norm, statistics of the batch
batch_frozen    batch norm with frozen statistics, as in the last fifth of a training

Bare steps (forward, backward, clipping, optimiser; labels alone) on the same batches in memory, no loader running. The
arms take turns step by step, and their medians are compared; `ratio` says how many times faster than `instance`. CPU
seconds tell more than those of the clock where the machine has other work. A profile of each arm says where they go:
its operators by their own CPU time, for a step.

Example:

    python -m pipelines.measure.train.norm_speed -d 4 -r 4 -o record.json
"""

import os
import statistics
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `fastnnunet train` sets it, before OpenMP starts

import torch

from fastnnunet.distill.check import resolve_device
from fastnnunet.distill.job import TrainingJob
from fastnnunet.distill.memory import keep_freed_memory
from fastnnunet.nnunet.trainer.norms import freeze
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.measure.head import header, put, training_arguments
from pipelines.measure.train.step_speed import batches_of, make_trainer, synchronize, temporary_results

ARMS = {"instance": "same", "batch": "batch", "batch_frozen": "batch"}
WARM, SHOWN = 3, 12  # steps; operators of a profile


def profile(trainer: Any, batch: Any) -> dict[str, float]:
    """The operators that take longest: their own milliseconds of CPU in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        trainer.train_step(batch)
    longest = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)[:SHOWN]
    return {event.key: event.self_cpu_time_total / 1000 for event in longest}


def measure(job: TrainingJob, steps: int) -> dict[str, Any]:
    threads = job.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    if resolve_device(job.device) == "cpu":
        keep_freed_memory()  # as a training does
    with temporary_results(job.teacher):
        trainers = {
            name: make_trainer(replace(job, student=replace(job.student, norm=norm)), None)
            for name, norm in ARMS.items()
        }
        batches = batches_of(trainers["instance"], 3)
        wall: dict[str, list[float]] = {name: [] for name in ARMS}
        cpu: dict[str, list[float]] = {name: [] for name in ARMS}
        for name, trainer in trainers.items():
            trainer.network.train()
            if name == "batch_frozen":
                freeze(trainer.network)
        for number in range(WARM + steps):
            for name, trainer in trainers.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                trainer.train_step(batches[number % len(batches)], number)
                synchronize()
                if number >= WARM:
                    wall[name].append(time.perf_counter() - start)
                    cpu[name].append(time.process_time() - cpu_start)
        profiles = {name: profile(trainer, batches[0]) for name, trainer in trainers.items()}
        shape = list(batches[0]["data"].shape)
    median, median_cpu = ({n: statistics.median(v) for n, v in seconds.items()} for seconds in (wall, cpu))
    return {
        **header("seconds per training step by norm, medians"),
        "device": str(trainers["batch"].device),
        "bf16": trainers["batch"].bf16,
        "threads": threads,
        "load_average": list(os.getloadavg()),
        "student": job.student.tag,
        "batch": shape,
        "steps": steps,
        "median_s": median,
        "median_cpu_s": median_cpu,
        "ratio": {name: median["instance"] / median[name] for name in ARMS},
        "cpu_ratio": {name: median_cpu["instance"] / median_cpu[name] for name in ARMS},
        "profile_ms": profiles,
        "seconds": wall,
    }


if __name__ == "__main__":
    parser = training_arguments(__doc__)
    parser.add_argument("-r", type=int, default=4)
    parser.add_argument("--family", default="lite", help="of the student: width or lite")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--patch-size", type=int, nargs="+", help="of the patches, if not the plans'")
    parser.add_argument("--precision", default="auto", help="fp32, bf16 or auto")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    training = TrainingJob(
        teacher=TeacherSpec(dataset=args.d, configuration=args.c, folds=(args.f,)),
        student=StudentSpec(r=args.r, family=args.family),
        distill=DistillSpec(
            alpha=0,
            optimizer="adamw",
            batch_size=args.batch_size,
            precision=args.precision,
            **({"last_patch": tuple(args.patch_size), "last_share": 1.0} if args.patch_size else {}),
        ),
        cache=CacheSpec(),
        fold=args.f,
        device=args.device,
        threads=args.threads,
    )
    record = measure(training, args.steps)
    put(record, args.o)
    for arm, value in record["median_s"].items():
        print(f"{arm:14} {1000 * value:8.1f} ms, {1000 * record['median_cpu_s'][arm]:8.1f} ms of CPU")
    for arm, value in record["ratio"].items():
        print(f"{arm:14} {value:.2f} times instance's speed, {record['cpu_ratio'][arm]:.2f} by CPU time")
