"""nnU-Net-style commands for distillation: `nnUNetv2_distillation_train` and `nnUNetv2_distillation_export_onnx`.

They take nnU-Net's short flags, write where `fastnnunet train` and `fastnnunet export` write, and build the soft-label
cache first when there is none.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.cli.guard import guarded, refuse_empty
from fastnnunet.cli.parts.choices import parse_folds, student_specs, teacher_of
from fastnnunet.cli.parts.fields import add_argument
from fastnnunet.errors import MismatchError, NotFoundError, SpecError
from fastnnunet.specs.checks.networks import allow_code
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec

if TYPE_CHECKING:
    from fastnnunet.distill.job import TrainingJob


VARIANTS = {  # command -> (the teacher's plans, the teacher's trainer)
    "": ("nnUNetPlans", "nnUNetTrainer"),
    "resenc_": ("nnUNetResEncUNetMPlans", "nnUNetTrainer"),
    "primus_": ("nnUNetPlans", "nnUNet_Primus_M_Trainer"),
}
# field -> nnU-Net's name for its option
OPTIONS = (
    *((TeacherSpec, "dataset", "-d"), (TeacherSpec, "configuration", "-c")),
    *((DistillSpec, "alpha", "-a"), (DistillSpec, "temperature", "-temp")),
    *((StudentSpec, "plans_name", "-spl"), (StudentSpec, "blocks", "-bs"), (StudentSpec, "size", "-ts")),
)
TRAIN_OPTIONS = (
    *((TeacherSpec, "folds", "-tf"), (TeacherSpec, "checkpoint", "-tcp")),
    *((DistillSpec, "epochs", "-e"), (DistillSpec, "iterations_per_epoch", "--iterations")),
    *((DistillSpec, "optimizer", "--optimizer"), (DistillSpec, "start", "--start")),
)
EXPORT_OPTIONS = (
    *((GraphSpec, "patch_size", "-is"), (GraphSpec, "dynamic_space", "-da"), (GraphSpec, "simplify", "-sim")),
)


def distillation_train(argv: list[str] | None = None) -> None:
    """Console entry point of `nnUNetv2_distillation_train`."""
    _train_command("", argv)


def distillation_export_onnx(argv: list[str] | None = None) -> None:
    """Console entry point of `nnUNetv2_distillation_export_onnx`."""
    _export_command("", argv)


def resenc_distillation_train(argv: list[str] | None = None) -> None:
    """Console entry point of `nnUNetv2_resenc_distillation_train`."""
    _train_command("resenc_", argv)


def resenc_distillation_export_onnx(argv: list[str] | None = None) -> None:
    """Console entry point of `nnUNetv2_resenc_distillation_export_onnx`."""
    _export_command("resenc_", argv)


def primus_distillation_train(argv: list[str] | None = None) -> None:
    """Console entry point of `nnUNetv2_primus_distillation_train`."""
    _train_command("primus_", argv)


def primus_distillation_export_onnx(argv: list[str] | None = None) -> None:
    """Console entry point of `nnUNetv2_primus_distillation_export_onnx`."""
    _export_command("primus_", argv)


def _train_command(variant: str, argv: list[str] | None) -> None:
    example = f"nnUNetv2_{variant}distillation_train -d 4 -f 0 -r 2"
    parser = _parser(variant, "Distil one student from a trained nnU-Net ensemble.", example)
    for spec, name, flags in TRAIN_OPTIONS:
        add_argument(parser, spec, name, flags)
    parser.add_argument("-w", type=Path, help="nnU-Net checkpoint of fitting shapes to start the student from")
    parser.add_argument("-disable_mirroring", action="store_true", help="no mirroring, neither in training nor in use")
    parser.add_argument("--use_da5", action="store_true", help="nnU-Net's DA5 augmentation")
    parser.add_argument("-d_device", default="auto", help="cpu or cuda")
    parser.add_argument(
        "-c_continue", "--c", dest="c_continue", action="store_true", help="continue from the latest checkpoint"
    )
    _run(_train, parser, argv)


def _export_command(variant: str, argv: list[str] | None) -> None:
    example = f"nnUNetv2_{variant}distillation_export_onnx -d 4 -f 0 -r 2 -o bundle_r2 -v"
    parser = _parser(variant, "Export a student as a validated bundle.", example)
    parser.add_argument("-o", type=Path, help="bundle folder (default: beside the student's checkpoint)")
    parser.add_argument("-v", action="store_true", help="say how the exported model was validated (it always is)")
    for spec, name, flags in EXPORT_OPTIONS:
        add_argument(parser, spec, name, flags)
    parser.add_argument("-b", type=int, default=1, help="batch size of -fix; without -fix every batch size works")
    parser.add_argument("-fix", action="store_true", help="fixed shapes, the batch size of -b among them")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    _run(_export, parser, argv)


def _parser(variant: str, description: str, example: str) -> argparse.ArgumentParser:
    plans, trainer = VARIANTS[variant]
    parser = argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("-f", default="0", help="the student's fold")
    for spec, name, flags in OPTIONS:
        add_argument(parser, spec, name, flags)
    sizes = "student size: width divided by r (2 where neither -r nor -ts is given)"
    add_argument(parser, StudentSpec, "r", "-r", default=None, help=sizes)
    add_argument(parser, TeacherSpec, "plans", "-tpl", default=plans)
    add_argument(parser, TeacherSpec, "trainer", "-t -tr", default=trainer)
    parser.add_argument(
        "--allow-code", action="store_true", help="run code that the teacher names; only if you trust it"
    )
    return parser


def _student(args: argparse.Namespace, plans_name: str | None) -> "StudentSpec":
    sizes = None if args.r is None else [args.r]
    if sizes is None and args.size is None:
        sizes = [2]
    return student_specs(sizes, None, {"blocks": args.blocks, "size": args.size}, plans_name)[0]


def _run(
    command: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: list[str] | None
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def run() -> None:
        refuse_empty(sys.argv[1:] if argv is None else argv)
        args = parser.parse_args(argv)
        with allow_code() if args.allow_code else contextlib.nullcontext():
            command(args)

    guarded(run)


def _train(args: argparse.Namespace) -> None:
    from fastnnunet.cli.train import run_jobs, wait_passively

    wait_passively()
    from fastnnunet.distill.check import check_job, resolve_device
    from fastnnunet.distill.job import TrainingJob
    from fastnnunet.specs.cache import CacheSpec
    from fastnnunet.specs.load import build_spec
    from fastnnunet.teachers.jobs import cache_for_training

    named = {name: getattr(args, name) for name in ("dataset", "configuration", "plans", "trainer", "checkpoint")}
    trained = ("alpha", "temperature", "epochs", "iterations_per_epoch", "optimizer", "start")
    settings = {
        **{name: getattr(args, name) for name in trained},
        "mirror_augmentation": not args.disable_mirroring,
        "augmentation": "da5" if args.use_da5 else "default",
    }
    job = TrainingJob(
        teacher=teacher_of(named, args.folds),
        student=_student(args, args.plans_name),
        distill=build_spec(DistillSpec, settings, where="options"),
        cache=dataclasses.replace(CacheSpec(), temperature=args.temperature),
        fold=parse_folds([args.f])[0],
        device=args.d_device,
        pretrained=args.w,
    )
    resolve_device(job.device)  # before hours of labelling
    check_job(job, resume=args.c_continue, overwrite=False)
    if job.distill.alpha > 0:
        try:
            cache_for_training(job.teacher, job.cache)
        except (NotFoundError, MismatchError) as e:
            _build_cache(job, reason=str(e).splitlines()[0])
    run_jobs([job], resume=args.c_continue, overwrite=False, validate=True)


def _build_cache(job: "TrainingJob", reason: str) -> None:
    from fastnnunet.api import label
    from fastnnunet.cli.parts.cache_view import cache_view

    print(f"{reason}\nbuilding the soft-label cache first, once for all student sizes", file=sys.stderr)
    with cache_view() as view:
        label(job.teacher, job.cache, threads=os.cpu_count() or 1, progress=view)


def _export(args: argparse.Namespace) -> None:
    from fastnnunet.api.export import student_model
    from fastnnunet.cli.export import export_model

    if args.dynamic_space and args.fix:
        raise SpecError("-da makes shapes dynamic, -fix makes them fixed; give one")
    if args.b > 1 and not args.fix:
        print(f"-b {args.b} without -fix changes nothing: the batch axis is dynamic", file=sys.stderr)
    graph = GraphSpec(
        patch_size=tuple(args.patch_size) if args.patch_size else None,
        dynamic_space=args.dynamic_space,
        simplify=args.simplify,
        batch_size=args.b if args.fix else None,
    )
    folder = student_model(
        args.dataset,
        _student(args, None),
        DistillSpec(alpha=args.alpha, temperature=args.temperature),
        configuration=args.configuration,
        plans=args.plans,
        student_plans=args.plans_name,
        folds=[args.f],
    )
    export_model(folder, [args.f], args.o, overwrite=args.overwrite, graph=graph, verbose=args.v)
