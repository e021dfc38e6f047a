"""Sets of unlabelled images, preprocessed by nnU-Net's own preprocessor as labelled cases are.

`<nnUNet_preprocessed>/<dataset>/unlabelled/<name>/` holds, for every way of preprocessing (data identifier of plans):

<data identifier>.json     where the images are, how they were preprocessed, the files of every finished case
<data identifier>/         the cases, readable by nnU-Net's data set class; segmentations are 0, or -1 outside the body
<data identifier>.<key>/   foreground voxels of every case according to the soft labels of the cache with this key
"""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastnnunet.errors import (
    NO_ROOM,
    BuildError,
    CorruptError,
    DiskSpaceError,
    FastnnUNetError,
    MismatchError,
    NotFoundError,
    SpecError,
)
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.nnunet.files.cases import PREPROCESSING_FIELDS, PreprocessedCases
from fastnnunet.nnunet.files.paths import nnunet_folder
from fastnnunet.nnunet.files.plans import configuration_of, intensity_properties, num_image_channels
from fastnnunet.nnunet.unlabelled.image_case import ENDINGS, PARTIAL, ImageTask, preprocess_case, reason_of, shape_after
from fastnnunet.nnunet.unlabelled.image_folder import FileStamp, find_images, unchanged, unusable
from fastnnunet.nnunet.unlabelled.parallel import each
from fastnnunet.specs.canonical import canonical_json, sha256_of
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.distill import SET_NAME
from fastnnunet.system.files import atomic_output
from fastnnunet.system.locks import locked

SETS = "unlabelled"
VERSION = 1
_PLANS_FIELDS = ("transpose_forward", "image_reader_writer")
_STATISTICS = "foreground_intensity_properties_per_channel"
_CONFIGURATION_FIELDS = (
    *PREPROCESSING_FIELDS,
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
    "preprocessor_name",
)


@dataclass(frozen=True)
class UnlabelledCases(PreprocessedCases):
    """The finished cases of a set."""

    finished: tuple[str, ...]
    remake: str = field(default="remove it and run the same fastnnunet cache build --images again", kw_only=True)

    @cached_property
    def case_ids(self) -> tuple[str, ...]:
        """Case identifiers in sorted order."""
        return tuple(sorted(self.finished))


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRecord:
    """What is known of a set; written after every case."""

    images: Path  # the folder the images came from
    preprocessing: str  # digest of everything that changes a voxel
    cases: dict[str, dict[str, FileStamp]]  # finished case -> its image files


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """A set by name, and the plans it is preprocessed with."""

    name: str
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    option: str = "--images"  # what the folder of images was given with
    tell: bool = True  # what else lies in that folder

    @property
    def folder(self) -> Path:
        """Where all of the set is."""
        return sets_folder(self.plans["dataset_name"]) / self.name

    @property
    def data_identifier(self) -> str:
        """nnU-Net's name for this way of preprocessing."""
        return str(configuration_of(self.plans, self.configuration)[1].data_identifier)

    @property
    def cases_folder(self) -> Path:
        """The preprocessed cases."""
        return self.folder / self.data_identifier

    def foreground_folder(self, key: str) -> Path:
        """Foreground voxels according to the cache with this key."""
        return self.folder / f"{self.data_identifier}.{key[:16]}"

    @property
    def preprocessing(self) -> str:
        """Digest of what of the plans changes a preprocessed voxel."""
        manager, config = configuration_of(self.plans, self.configuration)
        fields = {f: manager.plans.get(f) for f in _PLANS_FIELDS} | {_STATISTICS: intensity_properties(manager)}
        return sha256_of(fields | {f: config.configuration.get(f) for f in _CONFIGURATION_FIELDS})

    @property
    def cases(self) -> UnlabelledCases:
        """The finished cases. Raises NotFoundError, CorruptError."""
        return UnlabelledCases(self.cases_folder, tuple(self.record().cases))

    @property
    def record_file(self) -> Path:
        return self.folder / f"{self.data_identifier}.json"

    def record(self) -> SetRecord:
        """Raises NotFoundError when nothing was preprocessed yet, CorruptError."""
        return read_record(self.record_file)

    def find_images(self, images: Path, *, tell: bool = True) -> dict[str, tuple[Path, ...]]:
        """Case id -> files in `images`; errors and warnings as of `image_folder.find_images`."""
        ending, channels = self.dataset_json["file_ending"], num_image_channels(self.dataset_json)
        return find_images(images, ending, channels, tell=tell and self.tell, option=self.option)


def sets_folder(dataset_name: str) -> Path:
    """Where the sets of a data set are."""
    return nnunet_folder("nnUNet_preprocessed") / dataset_name / SETS


def name_for(images: Path, name: str | None) -> str:
    """`name`, or one made of the folder's own. Raises SpecError for a name that cannot be part of a run's name."""
    made = name or default_name(images)
    if not SET_NAME.fullmatch(made) or "__" in made:
        raise SpecError(f"--name: got {made!r}, expected letters, digits, '.', '-' and single '_'")
    return made


def default_name(images: Path) -> str:
    """The folder's own name without what cannot be part of a run's name; may be empty."""
    return re.sub("_+", "_", re.sub("[^A-Za-z0-9._-]", "-", images.resolve().name)).strip("._-")


def resolve_set(plans: dict[str, Any], configuration: str, reference: str) -> str:
    """The name of a set, given that name or the folder its images came from.

    Raises NotFoundError with the sets there are, SpecError when several were made from that folder.
    """
    identifier = configuration_of(plans, configuration)[1].data_identifier
    files = sorted(sets_folder(plans["dataset_name"]).glob(f"*/{identifier}.json"))
    names = [f.parent.name for f in files]
    if Path(reference).is_dir():
        source = Path(reference).resolve()
        made = [f.parent.name for f in files if read_record(f).images == source]
        if len(made) > 1:
            raise SpecError(f"--unlabelled {reference}: several sets were made from it, name one: {', '.join(made)}")
        if made:
            return made[0]
    if reference in names:
        return reference
    known = f"sets there are: {', '.join(names) or '(none)'}"
    if Path(reference).is_dir():
        raise NotFoundError(f"--unlabelled {reference}: these images were not preprocessed and labelled yet\n{known}")
    raise NotFoundError(f"--unlabelled {reference}: neither a folder of images nor a set of unlabelled images\n{known}")


def read_record(file: Path) -> SetRecord:
    """Raises NotFoundError, CorruptError."""
    try:
        raw = read_json_object(file)
        if raw["format_version"] != VERSION:
            raise CorruptError(f"{file}: format version {raw['format_version']}, expected {VERSION}")
        cases = {
            str(case): {str(name): (int(s), int(t), str(d)) for name, (s, t, d) in files.items()}
            for case, files in raw["cases"].items()
        }
        return SetRecord(images=Path(raw["images"]), preprocessing=str(raw["preprocessing"]), cases=cases)
    except FileNotFoundError as e:
        raise NotFoundError(f"no unlabelled images were preprocessed: {file} is missing") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CorruptError(f"{file} is damaged: {e}\nremove {file.parent} and build again") from e


def preprocess_images(
    target: ImageSet, images: Path, labelled: Sequence[str], processes: int, progress: Listener = ignore
) -> UnlabelledCases:
    """Bring a set up to date with a folder of images: new and changed ones are preprocessed, absent ones removed.

    Each case is there whole or not at all, and an interrupted call goes on where it stopped. `labelled` are the ids of
    the data set's own cases.
    Raises ImageError naming all images that cannot be used (the others are kept), NotFoundError, SpecError when the set
    was made from other images, MismatchError when ids are those of labelled cases, BuildError, DiskSpaceError.
    """
    images = images.resolve()
    found = target.find_images(images)
    require_other_names(found, labelled)
    with _locked(target.folder):
        known = _finished(target, images, found)
        tasks = _tasks(target, found, known)
        record = SetRecord(images=images, preprocessing=target.preprocessing, cases=known)
        _write_record(target.record_file, record)
        _remove_others(target.cases_folder, known)
        problems: dict[str, str] = {}
        for case, outcome in each(preprocess_case, tasks, processes):
            if isinstance(outcome, DiskSpaceError):
                raise outcome
            if isinstance(outcome, OSError) and outcome.errno in NO_ROOM:
                raise _write_error(outcome, target.folder)
            if isinstance(outcome, Exception):
                problems[case] = reason_of(outcome)
            else:
                known[case] = outcome
                _write_record(target.record_file, record)
            done = len(known) + len(problems)
            progress(Progress(what="preprocessing images", done=done, total=len(found), unit="cases"))
    if problems:
        raise unusable(images, problems)
    return target.cases


def expected_shapes(
    target: ImageSet, images: Path, labelled: Sequence[str], processes: int, progress: Listener = ignore
) -> tuple[dict[str, tuple[int, int, int]], list[str]]:
    """Shape (Z, Y, X) every case has or will have, and the cases not preprocessed yet; writes nothing.

    Images not preprocessed yet are read. Errors as of `preprocess_images`.
    """
    images = images.resolve()
    found = target.find_images(images)
    require_other_names(found, labelled)
    known = _finished(target, images, found)
    cases = UnlabelledCases(target.cases_folder, tuple(known))
    shapes = {case: cases.shape_zyx(case) for case in known}
    tasks = _tasks(target, found, known)
    problems: dict[str, str] = {}
    for case, outcome in each(shape_after, tasks, processes):
        if isinstance(outcome, Exception):
            problems[case] = reason_of(outcome)
        else:
            shapes[case] = outcome
        done = len(shapes) + len(problems)
        progress(Progress(what="reading images", done=done, total=len(found), unit="cases"))
    if problems:
        raise unusable(images, problems)
    return shapes, list(tasks)


def require_current(target: ImageSet, labelled: Sequence[str], command: str) -> UnlabelledCases:
    """The cases of a set for a training. `command` is what brings it up to date.

    The folder of images may be gone by now; while it is there, its images must be those that were preprocessed.
    Raises NotFoundError, CorruptError, MismatchError.
    """
    record = target.record()
    require_other_names(record.cases, labelled)
    problems = []
    if record.preprocessing != target.preprocessing:
        problems.append("the teacher's plans preprocess images in another way now")
    if record.images.is_dir():
        found = target.find_images(record.images, tell=False)
        kinds = {
            "new": [c for c in found if c not in record.cases],
            "changed": [c for c, files in record.cases.items() if c in found and not unchanged(found[c], files)],
            "no longer there": [c for c in record.cases if c not in found],
        }
        problems += [f"{kind}: {' '.join(cases)}" for kind, cases in kinds.items() if cases]
    if problems:
        raise MismatchError(
            f"unlabelled images {target.name} are not what was preprocessed from {record.images}\n"
            + "\n".join(f"  - {p}" for p in problems)
            + f"\nbring them up to date with: {command}"
        )
    return target.cases


def require_other_names(found: Any, labelled: Sequence[str]) -> None:
    """Raise MismatchError when an unlabelled case has the name of a labelled one."""
    if clash := sorted(set(found) & set(labelled)):
        raise MismatchError(
            f"{len(clash)} unlabelled image(s) have the name of a case of the data set: {' '.join(clash)}\n"
            "take them out of the folder if they are the same images, else rename them"
        )


def require_other_images(unlabelled: Mapping[str, str], labelled: Mapping[str, str]) -> None:
    """Raise MismatchError when images have the digests of labelled ones: one of those may be a validation case.

    Both are case -> digest of its preprocessed image.
    """
    own = {digest: case for case, digest in labelled.items()}
    same = {case: own[digest] for case, digest in unlabelled.items() if digest in own}
    if same:
        pairs = "\n".join(f"  - {case} is {labelled_case}" for case, labelled_case in same.items())
        raise MismatchError(
            f"{len(same)} unlabelled image(s) are labelled cases under another name:\n{pairs}\n"
            "take them out of the folder and run fastnnunet cache build --images again"
        )


def _finished(target: ImageSet, images: Path, found: dict[str, tuple[Path, ...]]) -> dict[str, dict[str, FileStamp]]:
    """Cases that need not be preprocessed again. Raises SpecError when the set was made from other images."""
    try:
        record = target.record()
    except NotFoundError:
        return {}
    same = {case: files for case, files in record.cases.items() if case in found and unchanged(found[case], files)}
    if record.images != images and len(same) < len(record.cases):
        raise SpecError(
            f"the set {target.name} was made from {record.images}, not from {images}\n"
            "give this folder a set of its own with --name"
        )
    if record.preprocessing != target.preprocessing:
        return {}
    folder = target.cases_folder
    return {case: files for case, files in same.items() if all((folder / f"{case}{e}").is_file() for e in ENDINGS)}


def _tasks(target: ImageSet, found: Mapping[str, tuple[Path, ...]], known: Container[str]) -> dict[str, ImageTask]:
    """The work of every image that is not known yet."""
    return {
        case: ImageTask(
            case_id=case,
            files=files,
            folder=target.cases_folder,
            plans=target.plans,
            configuration=target.configuration,
            dataset_json=target.dataset_json,
        )
        for case, files in found.items()
        if case not in known
    }


def _write_record(file: Path, record: SetRecord) -> None:
    with atomic_output(file) as partial:
        partial.write_text(canonical_json({"format_version": VERSION, **dataclasses.asdict(record)}))


def _write_error(error: OSError, path: Path) -> FastnnUNetError:
    if error.errno in NO_ROOM:
        return DiskSpaceError(f"no room left while writing {path}\nfree some space and run the same command again")
    return BuildError(f"cannot write {path}: {error.strerror or error}\nmend that and run the same command again")


def _remove_others(folder: Path, cases: dict[str, Any]) -> None:
    """Remove files of cases that are not in `cases`, and what killed processes left behind."""
    keep = {f"{case}{ending}" for case in cases for ending in ENDINGS}
    for file in folder.glob("*") if folder.is_dir() else ():
        if file.name not in keep:
            file.unlink()
    for leftover in folder.parent.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build of a set at a time; the system gives the lock back when the process dies.

    Where it has no locks a warning asks the user to see to it.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
        except BlockingIOError as e:
            raise BuildError(f"another process is preprocessing {folder}\nwait for it and run the same command") from e
        except OSError as e:
            raise _write_error(e, folder) from e
        yield
