"""A published nnU-Net model as a teacher: its folder or the zip it came in, without the data set it learnt from.

No fold is known to have seen any case, so that all of them label whatever they are given. A zip is unpacked once, to
`$FASTNNUNET_CACHE_HOME/models/<digest>` (default `~/.cache/fastnnunet`). What makes the teacher is read from its files,
as nnU-Net reads them; names of folders only tell several models apart.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastnnunet.errors import CorruptError, NotFoundError, SpecError, printable
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.nnunet.files.named import check_loadable
from fastnnunet.nnunet.files.paths import check_model_folder
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import Fold, PublishedSpec
from fastnnunet.teachers.archive import no_model, unpacked
from fastnnunet.teachers.nnunet import NnUNetTeacher, make_teacher, unknown_trainer

FINAL = "checkpoint_final.pth"
_USUAL_FOLDS = 5  # of nnU-Net's cross-validation
_OPTIONS = (("trainer", "-tr"), ("plans", "-p"), ("configuration", "-c"))


def open_published(
    spec: PublishedSpec, recipe: CacheSpec, progress: Listener = ignore, *, takes_folds: bool = True
) -> NnUNetTeacher:
    """The teacher in a folder or zip; reads every fold's checkpoint and keeps none.

    `progress` is told, as messages, what is not as one would expect: folds that are missing, another checkpoint than
    the final one, a trainer that is not installed. `takes_folds`: whether -f chooses its folds, for advice in errors.
    Raises NotFoundError, SpecError (several models and none named; a cascade stage), CorruptError, MismatchError,
    DiskSpaceError.
    """
    teacher = open_model(spec, recipe, progress, takes_folds=takes_folds)
    if (stage := teacher.files.model.config.previous_stage_name) is not None:
        raise SpecError(
            f"{spec.path}: {teacher.files.configuration} is a cascade stage and needs predictions of {stage}, which "
            "new images do not have\nuse a configuration without a previous stage"
        )
    return teacher


def open_model(
    spec: PublishedSpec, recipe: CacheSpec, progress: Listener = ignore, *, takes_folds: bool = True
) -> NnUNetTeacher:
    """As `open_published`, also for the second stage of a cascade, whose images have the channels of its first."""
    files, folds = find_model(spec, progress)
    check_loadable(files.plans, files.configuration)
    _check_folds(files, folds, takes_folds)
    if (said := unknown_trainer(files, folds[0])) is not None:
        progress(Message(text=said, level="warning"))
    return make_teacher(files, folds, recipe, unseen={})


def find_model(spec: PublishedSpec, progress: Listener = ignore) -> tuple[ModelFolder, tuple[Fold, ...]]:
    """The model folder that is meant, with its configuration and checkpoint, and the folds to use.

    Raises NotFoundError, SpecError, CorruptError, DiskSpaceError.
    """
    place = unpacked(spec.path) if spec.path.is_file() else spec.path
    folder = _model_in(place, spec).folder
    by_fold = _checkpoints_in(folder)
    checkpoint = _checkpoint_of(by_fold, spec, progress)
    folds = spec.folds if spec.folds is not None else _folds_with(by_fold, checkpoint, spec.path, progress)
    check_model_folder(folder, folds, checkpoint)
    configuration = spec.configuration or _trained_for(folder / f"fold_{folds[0]}" / checkpoint)
    return ModelFolder(folder, configuration, checkpoint), folds


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A model folder and its names as far as the folder's own tells them."""

    folder: Path
    trainer: str | None
    plans: str | None
    configuration: str | None

    def fits(self, spec: PublishedSpec) -> bool:
        """Whether no name is known to be another than the one asked for."""
        return all(getattr(spec, name) in (None, getattr(self, name)) for name, _ in _OPTIONS)


def _model_in(place: Path, spec: PublishedSpec) -> FoundModel:
    described = [place] if (place / "plans.json").is_file() else [p.parent for p in sorted(place.rglob("plans.json"))]
    if not described:
        raise no_model(spec.path, (p.name for p in place.rglob("*")) if place.is_dir() else ())
    found = candidates(described)
    if not found:
        raise NotFoundError(
            f"no trained fold at {spec.path}: there is a plans.json, but no fold_0 with a {FINAL} beside it\n"
            "name a model folder, or a zip of one, with its checkpoints"
        )
    if len(found) == 1 and found[0].configuration is None:
        return found[0]  # whose names are told by nothing but its files
    fitting = [candidate for candidate in found if candidate.fits(spec)]
    if len(fitting) == 1:
        return fitting[0]
    asked = [f"{flag} {getattr(spec, name)}" for name, flag in _OPTIONS if getattr(spec, name) is not None]
    left = fitting or found
    options = [flag for name, flag in _OPTIONS if len({getattr(candidate, name) for candidate in left}) > 1]
    by_folder = "unzip it and name one of these folders" if spec.path.is_file() else "name its folder"
    advice = "choose one with " + " and ".join(options) if options else by_folder
    if not fitting and len(found) == 1:
        advice = f"leave out {' '.join(asked)}, or name another model"
    there = "\n".join(f"  - {printable(_name_in(place, candidate.folder))}" for candidate in left)
    raise SpecError(
        f"{spec.path}: {len(fitting)} models fit, expected one\n"
        f"  got      {' '.join(asked) or 'no option to choose by'}\n"
        f"  expected one of these models:\n{there}\n{advice}"
    )


def _name_in(place: Path, folder: Path) -> str:
    """Of a model folder in a place, which may be the model folder itself."""
    return folder.resolve().name if folder == place else str(folder.relative_to(place))


def candidates(described: Iterable[Path]) -> list[FoundModel]:
    """The models among folders with a plans.json: nnU-Net puts one beside predictions too, of a cross-validation and
    of an ensemble.
    """
    found = []
    for folder in described:
        if any(folder.glob("fold_*/*.pth")):
            names = folder.resolve().name.split("__")
            trainer, plans, configuration = names if len(names) == 3 else (None, None, None)
            found.append(FoundModel(folder=folder, trainer=trainer, plans=plans, configuration=configuration))
    return found


def _checkpoints_in(folder: Path) -> dict[Fold, set[str]]:
    """Fold -> names of its checkpoints; numbered folds in order, then `all`, and those without any."""
    names = {path.name.removeprefix("fold_"): path for path in folder.glob("fold_*") if path.is_dir()}
    folds: list[Fold] = [*sorted(int(name) for name in names if name.isdecimal()), *(["all"] if "all" in names else [])]
    return {
        fold: {p.name for p in (folder / f"fold_{fold}").glob("*.pth") if not p.name.startswith(".")} for fold in folds
    }


def _checkpoint_of(by_fold: dict[Fold, set[str]], spec: PublishedSpec, progress: Listener) -> str:
    if spec.checkpoint is not None:
        return spec.checkpoint
    chosen = [names for fold, names in by_fold.items() if spec.folds is None or fold in spec.folds]
    there = sorted(set().union(*chosen))
    if FINAL in there or not there:
        return FINAL
    if len(there) > 1:
        raise NotFoundError(
            f"no fold of {spec.path} has a {FINAL}: its training is not finished, or was published in part\n"
            f"  got      {', '.join(map(printable, there))}\nname the one to use with -chk"
        )
    progress(
        Message(text=f"{spec.path}: there is no {FINAL}; {printable(there[0])} is used, the only one", level="warning")
    )
    return there[0]


def _folds_with(by_fold: dict[Fold, set[str]], checkpoint: str, path: Path, progress: Listener) -> tuple[Fold, ...]:
    """All numbered folds that have the checkpoint, as nnU-Net chooses, else `all`. Raises NotFoundError."""
    having = [fold for fold, names in by_fold.items() if checkpoint in names]
    numbered = [fold for fold in having if isinstance(fold, int)]
    if not having:
        there = sorted(set().union(*by_fold.values()))
        raise NotFoundError(
            f"no fold of {path} has a {printable(checkpoint)}\n"
            f"  got      {', '.join(map(printable, there)) or 'no checkpoints'}\nname one of them with -chk"
        )
    if not numbered:
        progress(Message(text=f"{path}: there are no numbered folds; fold all is the teacher"))
        return tuple(having)
    absent = [fold for fold in range(max(_USUAL_FOLDS, max(numbered) + 1)) if fold not in numbered]
    if absent:
        reasons = [
            f"fold {fold} " + (f"has no {printable(checkpoint)}" if fold in by_fold else "is not there")
            for fold in absent
        ]
        progress(Message(text=f"{path}: {', '.join(reasons)}; the teacher is fold {_words(numbered)}", level="warning"))
    return tuple(numbered)


def _trained_for(checkpoint: Path) -> str:
    """The configuration that nnU-Net predicts with. Raises CorruptError."""
    return str(load_checkpoint(checkpoint)["init_args"]["configuration"])


def _check_folds(files: ModelFolder, folds: Sequence[Fold], takes_folds: bool) -> None:
    """Raise what is wrong with a checkpoint now, and say how to do without it."""
    for fold in folds:
        try:
            files.digest(fold)
        except CorruptError as e:
            if not (others := [other for other in folds if other != fold]):
                raise
            how = f": -f {_words(others)}" if takes_folds else f", by taking {files.path(fold).parent} away"
            raise CorruptError(f"{e}\nor leave fold {fold} out{how}") from e


def _words(folds: Sequence[Fold]) -> str:
    return " ".join(map(str, folds))
