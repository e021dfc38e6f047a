"""`export`: a student, or a trained nnU-Net ensemble, as a validated bundle."""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.api.names import find_trained, note_bundle
from fastnnunet.errors import NotFoundError
from fastnnunet.events import Listener, ignore
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.specs.student import StudentSpec

if TYPE_CHECKING:
    from fastnnunet.export.parity import ParityReport
    from fastnnunet.release.locator import Located
    from fastnnunet.release.ways import Ways

Fold = int | str
FINAL = "checkpoint_final.pth"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A bundle and how well it computes what PyTorch computes."""

    bundle: Path
    parity: "ParityReport"
    ways: "Ways | None" = None  # one pass beside nnU-Net's window, where the bundle has both and there are cases
    located: "Located | None" = None  # its locator, where it has one

    @property
    def described(self) -> str:
        """The parity, and how the ways to predict compare, in words."""
        report = self.parity
        text = (
            f"parity with PyTorch on {report.patches} {'real' if report.real else 'noise'} patches: largest logit "
            f"difference {report.max_abs_difference:.2g} (logits up to {report.max_abs_logit:.3g}), "
            f"same label on {report.label_agreement:.3%} of voxels"
        )
        return "\n".join([text, *(found.describe() for found in (self.ways, self.located) if found is not None)])


def export(
    model: Path,
    folds: Fold | Sequence[Fold],
    output: Path | None = None,
    *,
    checkpoint: str = FINAL,
    overwrite: bool = False,
    graph: GraphSpec = GraphSpec(),
    needs_real_patches: bool = True,
    locator: Path | None = None,
    measure: bool = True,
    progress: Listener = ignore,
) -> Exported:
    """Write the bundle of an nnU-Net model folder, of a student (see `student_model`) as of any other.

    Several folds make an ensemble. `output` None: `bundle` beside the checkpoint of the first fold. Without
    `needs_real_patches` noise takes the place of preprocessed cases that are not there.
    A bundle that is predicted in one pass is compared with nnU-Net's window on a few held-out cases, if there are any.
    `locator`: the model folder of `train_locator`, which goes into the bundle; its margin and what it does for Dice and
    seconds are measured on held-out cases, which have to be there.
    `measure`: the bundle of one fold tells the Dice of nnU-Net's validation of it, and that of a student its seconds on
    a few preprocessed cases, and their Dice where there was no validation.
    Raises what `fastnnunet.export.bundle.export_bundle` and, of a locator, `fastnnunet.release.locator` raise; nothing
    is at `output` then.
    """
    from fastnnunet.export.bundle import check_target, export_bundle, put_in_place
    from fastnnunet.release.ways import compare_ways

    folds = (folds,) if isinstance(folds, int | str) else tuple(folds)
    output = output or model / f"fold_{folds[0]}" / "bundle"
    options: dict[str, Any] = {
        "checkpoint": checkpoint,
        "graph": graph,
        "needs_real_patches": needs_real_patches,
        "progress": progress,
    }
    if locator is None:
        report = export_bundle(model, folds, output, overwrite=overwrite, **options)
        ways = compare_ways(output, progress)
        if measure:
            _note_measured(model, folds, checkpoint, output, progress)
        return Exported(bundle=output, parity=report, ways=ways)
    from fastnnunet.release.locator import attach_locator, export_locator

    check_target(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
        bundle, other = Path(name) / "bundle", Path(name) / "locator"
        export_locator(model, locator, folds, other)
        report = export_bundle(model, folds, bundle, **options)
        ways = compare_ways(bundle, progress)
        located = attach_locator(bundle, other, progress)
        if measure:
            _note_measured(model, folds, checkpoint, bundle, progress)
        put_in_place(bundle, output, overwrite)
    return Exported(bundle=output, parity=report, ways=ways, located=located)


def _note_measured(model: Path, folds: Sequence[Fold], checkpoint: str, bundle: Path, progress: Listener) -> None:
    """Of an ensemble nothing is known: each of its folds was validated by itself."""
    from fastnnunet.release.measured import measure_few, note, validated
    from fastnnunet.specs.bundle import load_bundle_spec

    if len(folds) != 1:
        return
    spec, fold = load_bundle_spec(bundle), str(folds[0])
    quality = validated(model / f"fold_{fold}", spec.labels, fold) if checkpoint == FINAL else None
    few = measure_few(bundle, progress) if spec.provenance["training"] else None
    if few is not None:
        note(bundle, quality or few[0], few[1])
    elif quality is not None:
        note(bundle, quality, None)


def export_named(
    name: str, folds: Sequence[Fold] | None = None, output: Path | None = None, **options: Any
) -> Exported:
    """Write the bundle of a run that was trained under this name, where `find_bundle` finds it; see `export`.

    `folds` default to those trained. Raises as `export`, and NotFoundError with the names there are.
    """
    run = find_trained(name)
    exported = export(run.model, folds or run.folds, output or run.bundle, **options)
    note_bundle(run, exported.bundle)
    return exported


def student_model(
    dataset: str,
    student: StudentSpec,
    distill: DistillSpec = DistillSpec(),
    *,
    configuration: str = "3d_fullres",
    plans: str = "nnUNetPlans",
    student_plans: str | None = None,
    folds: Sequence[Fold] = (0,),
) -> Path:
    """The model folder of a student, found by what it was trained with, or by the name of its plans.

    Raises NotFoundError with the command that trains it, or with the students that exist.
    """
    from fastnnunet.nnunet.files.paths import model_folder, resolve_dataset
    from fastnnunet.nnunet.files.plans import STOCK_TRAINER
    from fastnnunet.nnunet.student.plans import find_student

    name = resolve_dataset(dataset)
    if student_plans is not None:
        folder = model_folder(name, STOCK_TRAINER, student_plans, configuration)
        found = sorted(folder.parent.glob(f"*__{student_plans}__{configuration}"))  # a stock Primus has its own trainer
        folder = found[0] if found else folder
        if not folder.is_dir():
            there = [p.name.split("__")[1] for p in sorted(folder.parent.glob(f"*__{plans}_*__{configuration}"))]
            raise NotFoundError(f"no student at {folder}\nstudents that exist: {', '.join(there) or '(none)'}")
        return folder
    try:
        return find_student(name, plans, configuration, student, distill)
    except NotFoundError as e:
        command = _train_command(dataset, configuration, plans, folds, student, distill)
        raise NotFoundError(f"{e}\ntrain it with: {command}") from e


def _train_command(
    dataset: str, configuration: str, plans: str, folds: Sequence[Fold], student: StudentSpec, distill: DistillSpec
) -> str:
    """The `fastnnunet train` command of a student; one that is written out comes from a file."""
    words = ["fastnnunet", "train", "-d", dataset, "-c", configuration, "-p", plans, "-f", *map(str, folds)]
    if student.is_explicit:
        words += ["--student", "FILE"]
    elif student.size is not None:
        words += ["-ts", student.size]
    else:
        words += ["-r", str(student.r)]
        options = {
            "--family": "family",
            "--norm": "norm",
            "--round-to": "round_to",
            "-bs": "blocks",
            "--architecture": "architecture",
        }
        default = StudentSpec()
        for flag, field in options.items():
            if (value := getattr(student, field)) != getattr(default, field):
                words += [flag, str(value)]
    return shlex.join([*words, "-a", f"{distill.alpha:g}", "-temp", f"{distill.temperature:g}"])
