"""Names of runs: what a training was called, and what `export` and `predict` then need not be told again.

`$nnUNet_results/fastnnunet_runs/NAME/run.json` says which model folder and folds a name stands for, and where its
bundle is; `NAME/bundle` is where the bundle goes unless another place is asked for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, SpecError

RUNS, RUN_FILE = "fastnnunet_runs", "run.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Fold = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRun:
    """What a name stands for."""

    name: str
    model: Path
    folds: tuple[Fold, ...]  # that were trained under this name
    bundle: Path  # where its bundle is, or will be


def check_name(name: str, model: Path) -> None:
    """Refuse a name that is no file name (SpecError), or that another model has (MismatchError)."""
    _require_file_name(name)
    if (_folder(name) / RUN_FILE).is_file() and (there := find_run(name)).model != model.absolute():
        raise MismatchError(
            f"--name {name}: that name has another run, {there.model}\n"
            f"give another name; to free this one remove {_folder(name) / RUN_FILE}"
        )


def name_run(name: str, model: Path, folds: Sequence[Fold]) -> None:
    """Let a name stand for a model; folds it has already stay, none yet reserves it. Raises as `check_name`."""
    check_name(name, model)
    known = find_run(name) if (_folder(name) / RUN_FILE).is_file() else None
    before, bundle = (known.folds, known.bundle) if known else ((), _folder(name) / "bundle")
    _write(NamedRun(name=name, model=model.absolute(), folds=tuple(dict.fromkeys([*before, *folds])), bundle=bundle))


def note_bundle(run: NamedRun, bundle: Path) -> None:
    """Remember where the bundle of a run was written."""
    _write(NamedRun(name=run.name, model=run.model, folds=run.folds, bundle=bundle.absolute()))


def find_run(name: str) -> NamedRun:
    """What a name stands for. Raises NotFoundError with the names there are, SpecError, CorruptError."""
    from fastnnunet.specs.checks.json_text import read_json_object

    _require_file_name(name)
    file = _folder(name) / RUN_FILE
    if not file.is_file():
        known = sorted(path.parent.name for path in _folder(name).parent.glob(f"*/{RUN_FILE}"))
        raise NotFoundError(
            f"no run is called {name!r}; names there are: {', '.join(known) or '(none)'}\n"
            f"give a run its name with: fastnnunet train ... --name {name}"
        )
    try:
        stored = read_json_object(file)
        model, folds, bundle = stored["model"], stored["folds"], stored["bundle"]
        if not isinstance(folds, list) or not all(isinstance(fold, int | str) for fold in folds):
            raise ValueError(f"folds {folds}")
        results = file.parent.parent.parent
        return NamedRun(name=name, model=results / model, folds=tuple(folds), bundle=results / bundle)
    except (KeyError, TypeError, ValueError) as e:
        raise CorruptError(f"{file} is damaged: {e}\nremove it, and name the run again with: train --continue") from e


def find_trained(name: str) -> NamedRun:
    """As `find_run`, of a run that has a trained fold and whose model is there. Raises NotFoundError where not."""
    run = find_run(name)
    if not run.folds or not run.model.is_dir():
        what = "is gone" if run.folds else "has no fold that was trained to its end"
        raise NotFoundError(
            f"the run called {name!r}, {run.model}, {what}\n"
            f"train it with: fastnnunet train ... --name {name}, or free the name: remove {_folder(name) / RUN_FILE}"
        )
    return run


def find_bundle(name: str) -> Path:
    """The bundle of a named run. Raises NotFoundError with the command that makes it, and as `find_run`."""
    from fastnnunet.specs.bundle import is_bundle

    run = find_run(name)
    if not is_bundle(run.bundle):
        raise NotFoundError(f"{name} has no bundle at {run.bundle}\nmake it with: fastnnunet export onnx --name {name}")
    return run.bundle


def _require_file_name(name: str) -> None:
    if not NAME.fullmatch(name):
        got = repr(name if len(name) <= 40 else f"{name[:40]}...")
        raise SpecError(
            f"--name: got {got}, expected letters, digits, '.', '_' and '-', a letter or digit first, 100 at most"
        )


def _folder(name: str) -> Path:
    from fastnnunet.nnunet.files.paths import nnunet_folder

    return nnunet_folder("nnUNet_results").absolute() / RUNS / name


def _write(run: NamedRun) -> None:
    """Paths below nnUNet_results are kept relative to it, so that it can be moved."""
    import json

    from fastnnunet.system.files import atomic_output, make_folder

    folder = _folder(run.name)
    results = folder.parent.parent

    def kept(path: Path) -> str:
        return path.relative_to(results).as_posix() if path.is_relative_to(results) else str(path)

    make_folder(folder)
    with atomic_output(folder / RUN_FILE) as unfinished:
        record = {"model": kept(run.model), "folds": list(run.folds), "bundle": kept(run.bundle)}
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
