"""A model as the user names it, loaded: a bundle as it is, an nnU-Net model folder through a cache of bundles.

A model folder is exported once, which takes torch and nnunetv2; from then on its bundle is found by the digests of
checkpoints, plans and data set description, and neither is imported again. Kept below `$FASTNNUNET_CACHE_HOME` (default
`~/.cache/fastnnunet`):

teachers/KEY/            the bundle
teachers/files/ID.json   digests of the files of a model folder with their size and times, so that they are read once
"""

import contextlib
import importlib.util
import io
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastnnunet.errors import BackendError, CorruptError, FastnnUNetError, MismatchError, NotFoundError, SpecError
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.images.io import image_io
from fastnnunet.nnunet.files.paths import check_model_folder, trained_folds
from fastnnunet.nnunet.files.plans import read_json, unknown_trainer_text
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import FORMAT_VERSION, is_bundle
from fastnnunet.specs.canonical import sha256_of, sha256_of_file
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.specs.home import local_home
from fastnnunet.system.files import atomic_output

Fold = int | str
CHECKPOINT = "checkpoint_final.pth"
_EXPORT_NEEDS = ("torch", "nnunetv2", "onnx", "onnxscript")


def load_model(
    model: Path,
    folds: Sequence[Fold] | None = None,
    checkpoint: str | None = None,
    *,
    progress: Listener = ignore,
    **options: Any,
) -> Predictor:
    """Load a bundle or an nnU-Net model folder; `options` are those of `Predictor.load`.

    `folds` None: all of a bundle, all that are trained of a model folder (but not `all`). `checkpoint`: which one of a
    model folder. `progress` gets what a user who waits should know.
    Raises NotFoundError, SpecError, what `export_bundle` raises, and what `Predictor.load` raises.
    """
    if is_bundle(model):
        if checkpoint is not None:
            raise SpecError(f"-chk {checkpoint}: {model} is a bundle, which has one checkpoint; leave it out")
        return Predictor.load(model, folds=folds, **options)
    if model.is_file():
        raise NotFoundError(
            f"{model} is a file, expected the folder of a bundle or of an nnU-Net model\nunpack a zip of one first"
        )
    if not (model / "plans.json").is_file():
        raise NotFoundError(
            f"no bundle at {model}, and no nnU-Net model: neither bundle.json nor plans.json is there\n"
            f"name the folder that holds fold_0, fold_1 ..., or make a bundle: fastnnunet export onnx ... -o {model}"
        )
    checkpoint = checkpoint or CHECKPOINT
    chosen = trained_folds(model, checkpoint) if folds is None else tuple(folds)
    bundle = cached_bundle(model, chosen, checkpoint, progress=progress)
    try:
        return Predictor.load(bundle, **options)
    except CorruptError as e:
        progress(Message(text=f"{str(e).splitlines()[0]}\nit is made again"))
    return Predictor.load(cached_bundle(model, chosen, checkpoint, progress=progress, again=True), **options)


def check_reader(model: Path) -> None:
    """Refuse an nnU-Net model whose images no reader here reads, before it is exported. Raises SpecError."""
    plans = model / "plans.json"
    if not is_bundle(model) and plans.is_file():
        image_io(str(read_json(plans).get("image_reader_writer")))


def cached_bundle(
    model_folder: Path,
    folds: Sequence[Fold],
    checkpoint: str = CHECKPOINT,
    *,
    progress: Listener = ignore,
    again: bool = False,
) -> Path:
    """The bundle of an ensemble in the cache, exported now if it is not there or if `again`.

    Raises NotFoundError for missing folds, BackendError without torch, and what `export_bundle` raises.
    """
    check_model_folder(model_folder, folds, checkpoint)
    home = local_home() / "teachers"
    names = ["plans.json", "dataset.json", *(f"fold_{fold}/{checkpoint}" for fold in folds)]
    identity = {
        "format": FORMAT_VERSION,
        "folds": [str(fold) for fold in folds],  # their order too: float16 sums depend on it
        "files": _digests(model_folder, names, home / "files", progress),
    }
    key = sha256_of(identity)[:16]
    bundle = home / key
    if is_bundle(bundle) and not again:
        _tell_of_trainer(bundle, model_folder, progress)
        return bundle
    _check_export_possible(model_folder, folds)
    first_use = (
        f"first use of this model: exporting {len(folds)} fold(s) of {model_folder.name} to {bundle}, once, and "
        "comparing with PyTorch, which takes most of the time"
    )
    progress(Message(text=first_use))
    from fastnnunet.export.bundle import export_bundle  # takes seconds

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net about variables that are not needed here
            report = export_bundle(
                model_folder,
                folds,
                bundle,
                checkpoint=checkpoint,
                overwrite=again,
                graph=GraphSpec(one_pass=False),  # as nnU-Net predicts the model
                needs_real_patches=False,
                progress=progress,
            )
    except MismatchError:
        if again or not is_bundle(bundle):  # unless another process made the same one meanwhile
            raise
        return bundle
    except OSError as e:
        if isinstance(e, FastnnUNetError):
            raise
        raise FastnnUNetError(
            f"the bundle of {model_folder} cannot be kept in {home}: {e}\n"
            "name another folder with FASTNNUNET_CACHE_HOME"
        ) from e
    equal = (
        f"equal to PyTorch on {report.patches} {'real' if report.real else 'noise'} patches: largest logit difference "
        f"{report.max_abs_difference:.2g} of {report.max_abs_logit:.3g}"
    )
    progress(Message(text=equal))
    return bundle


def _tell_of_trainer(bundle: Path, model_folder: Path, progress: Listener) -> None:
    """Tell again what was told when a model of a trainer that is not installed was exported."""
    try:
        provenance = read_json_object(bundle / "bundle.json").get("provenance")
    except CorruptError:
        return  # which is found when it is loaded, and the bundle made again
    if isinstance(provenance, dict) and "network_of" in provenance:
        progress(Message(text=unknown_trainer_text(str(provenance.get("trainer")), model_folder), level="warning"))


def _check_export_possible(model_folder: Path, folds: Sequence[Fold]) -> None:
    missing = [name for name in _EXPORT_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(
            f"{model_folder} is an nnU-Net model, which has to be exported once; that needs {', '.join(missing)}\n"
            f"install it: pip install 'fastnnunet[train]', or export where it is installed and copy the bundle here:\n"
            f"fastnnunet export onnx -m {shlex.quote(str(model_folder))} -f {' '.join(map(str, folds))} -o BUNDLE"
        )


def _marks(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digests(folder: Path, names: Sequence[str], memory: Path, progress: Listener) -> dict[str, str]:
    """SHA-256 of files below `folder`, remembered as long as neither size, times nor inode of a file change."""
    remembered_file = memory / f"{sha256_of(str(folder.absolute()))[:16]}.json"
    try:
        remembered = read_json_object(remembered_file)
    except (OSError, ValueError):  # none yet, or damaged: only time is lost
        remembered = {}
    known = dict(remembered)
    marks = {name: _marks(folder / name) for name in names}
    new = [name for name in names if known.get(name, {}).get("marks") != marks[name]]
    if new:
        size = sum((folder / name).stat().st_size for name in new)
        what = f"{folder.name}: reading {len(new)} new or changed file(s), {size / 1e6:.0f} MB, to recognise them"
        progress(Message(text=what))
    for name in new:
        known[name] = {"marks": marks[name], "sha256": sha256_of_file(folder / name)}
    if known != remembered:
        # where nothing can be kept, this is done each time
        with contextlib.suppress(OSError, FastnnUNetError):
            os.makedirs(memory, exist_ok=True)
            with atomic_output(remembered_file) as partial:
                partial.write_text(json.dumps(known))
    return {name: known[name]["sha256"] for name in names}
