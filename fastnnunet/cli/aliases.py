"""nnU-Net-style commands for distillation: `nnUNetv2_distillation_train` and `nnUNetv2_distillation_export_onnx`.

They take nnU-Net's short flags, write where `fastnnunet train` and `fastnnunet export` write, and build the soft-label
cache first when there is none.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.cli.guard import guarded
from fastnnunet.errors import MismatchError, NotFoundError

if TYPE_CHECKING:
    from fastnnunet.distill.train import TrainingJob


def distillation_train(argv: list[str] | None = None) -> None:
    """Console entry point of `nnUNetv2_distillation_train`."""
    parser = _parser(
        "Distil one student from a trained nnU-Net ensemble.",
        "nnUNetv2_distillation_train -d 4 -f 0 -a 0.3 -temp 3.0 -r 2",
    )
    parser.add_argument("-tr", default="nnUNetTrainer", help="the teacher's trainer")
    parser.add_argument("-tf", nargs="+", default=["0", "1", "2", "3", "4"], help="teacher folds")
    parser.add_argument("-tcp", default="checkpoint_final.pth", help="the teacher's checkpoint")
    parser.add_argument("-e", type=int, default=1000, help="epochs")
    parser.add_argument("--iterations", type=int, default=250, help="iterations per epoch")
    parser.add_argument("--optimizer", default="sgd", help="sgd, or adamw for short runs")
    parser.add_argument("-d_device", default="auto", help="cpu or cuda")
    parser.add_argument(
        "-c_continue", "--c", dest="c_continue", action="store_true", help="continue from the latest checkpoint"
    )
    _run(_train, parser.parse_args(argv))


def distillation_export_onnx(argv: list[str] | None = None) -> None:
    """Console entry point of `nnUNetv2_distillation_export_onnx`."""
    parser = _parser(
        "Export a student as a validated bundle.", "nnUNetv2_distillation_export_onnx -d 4 -f 0 -r 2 -o bundle_r2 -v"
    )
    parser.add_argument("-o", type=Path, help="bundle folder [default: beside the student's checkpoint]")
    parser.add_argument("-v", action="store_true", help="say how the exported model was validated (it always is)")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    _run(_export, parser.parse_args(argv))


def _parser(description: str, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("-d", required=True, help="data set id or name")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-f", default="0", help="the student's fold")
    parser.add_argument("-r", type=int, default=2, help="student size: width divided by r")
    parser.add_argument("-a", type=float, default=0.3, help="weight of the soft loss")
    parser.add_argument("-temp", type=float, default=3.0, help="temperature")
    parser.add_argument("-tpl", default="nnUNetPlans", help="the teacher's plans")
    return parser


def _run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    guarded(lambda: command(args))


def _train(args: argparse.Namespace) -> None:
    from fastnnunet.cli.train import parse_folds, run_job
    from fastnnunet.distill.soft_labels import cache_for_training
    from fastnnunet.distill.train import TrainingJob, check_job
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.load import build_spec
    from fastnnunet.specs.student import StudentSpec
    from fastnnunet.specs.teacher import TeacherSpec

    settings = {
        "alpha": args.a,
        "temperature": args.temp,
        "epochs": args.e,
        "iterations_per_epoch": args.iterations,
        "optimizer": args.optimizer,
    }
    job = TrainingJob(
        teacher=TeacherSpec(
            dataset=args.d,
            configuration=args.c,
            plans=args.tpl,
            trainer=args.tr,
            folds=parse_folds(args.tf),
            checkpoint=args.tcp,
        ),
        student=StudentSpec(r=args.r),
        distill=build_spec(DistillSpec, settings, where="options"),
        cache=dataclasses.replace(CacheSpec(), temperature=args.temp),
        fold=parse_folds([args.f])[0],
        device=args.d_device,
    )
    check_job(job, resume=args.c_continue, overwrite=False)  # before hours of labelling
    if job.distill.alpha > 0:
        try:
            cache_for_training(job.teacher, job.cache)
        except (NotFoundError, MismatchError) as e:
            _build_cache(job, reason=str(e).splitlines()[0])
    run_job(job, resume=args.c_continue, overwrite=False, validate=True)


def _build_cache(job: "TrainingJob", reason: str) -> None:
    from fastnnunet.cache.build import build_cache
    from fastnnunet.cli.cache_view import BuildProgress
    from fastnnunet.distill.soft_labels import cache_job

    cache = cache_job(job.teacher, job.cache)
    print(f"{reason}\nbuilding the soft-label cache first, once for all student sizes: {cache.path}", file=sys.stderr)
    with BuildProgress(cache, cache.todo()) as progress:
        build_cache(cache, workers=0, threads=os.cpu_count() or 1, progress=progress.advance)


def _export(args: argparse.Namespace) -> None:
    from fastnnunet.cli.export import export_student
    from fastnnunet.specs.distill import DistillSpec
    from fastnnunet.specs.student import StudentSpec

    export_student(
        dataset=args.d,
        configuration=args.c,
        plans=args.tpl,
        fold=args.f,
        student=StudentSpec(r=args.r),
        distill=DistillSpec(alpha=args.a, temperature=args.temp),
        output=args.o,
        checkpoint="checkpoint_final.pth",
        overwrite=args.overwrite,
        verbose=args.v,
    )
