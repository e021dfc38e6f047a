"""A published nnU-Net model as a teacher: its folder or the zip it came in, without the data set it learnt from.

No fold is known to have seen any case, so that all of them label whatever they are given. A zip is unpacked once, to
`$FASTNNUNET_CACHE_HOME/models/<digest>` (default `~/.cache/fastnnunet`): descriptions and checkpoints, nothing else.
"""

import errno
import lzma
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from fastnnunet.errors import NO_ROOM, CorruptError, DiskSpaceError, NotFoundError, SpecError
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.nnunet.files.named import check_loadable
from fastnnunet.nnunet.files.paths import check_model_folder, trained_folds
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.home import HOME_VARIABLE, local_home
from fastnnunet.specs.teacher import PublishedSpec
from fastnnunet.teachers.nnunet import NnUNetTeacher, make_teacher

_WANTED = re.compile(r"(.*/)?(plans\.json|dataset\.json|fold_[^/]+/[^/]+\.pth)")


def open_published(spec: PublishedSpec, recipe: CacheSpec) -> NnUNetTeacher:
    """The teacher in a folder or zip; loads no weights.

    Raises NotFoundError, SpecError (several models and none named; a cascade stage), CorruptError, MismatchError,
    DiskSpaceError.
    """
    place = _unpacked(spec.path) if spec.path.is_file() else spec.path
    folder, configuration = _model_in(place, spec)
    folds = trained_folds(folder, spec.checkpoint) if spec.folds is None else spec.folds
    check_model_folder(folder, folds, spec.checkpoint)
    files = ModelFolder(folder, configuration, spec.checkpoint)
    check_loadable(files.plans, configuration)
    if (stage := files.model.config.previous_stage_name) is not None:
        raise SpecError(
            f"{spec.path}: {configuration} is a cascade stage and needs predictions of {stage}, which new images do "
            "not have\nuse a configuration without a previous stage"
        )
    return make_teacher(files, folds, recipe, unseen={})


def _model_in(place: Path, spec: PublishedSpec) -> tuple[Path, str]:
    """The model folder and its configuration, which the folder's name tells: TRAINER__PLANS__CONFIGURATION."""
    found = [place] if (place / "plans.json").is_file() else [p.parent for p in sorted(place.rglob("plans.json"))]
    if not found:
        raise NotFoundError(
            f"no nnU-Net model at {spec.path}: there is no plans.json\nname the folder that holds fold_0"
        )
    if len(found) == 1 and spec.configuration is not None:
        return found[0], spec.configuration
    named = {folder: folder.resolve().name.split("__")[-1] for folder in found if "__" in folder.resolve().name}
    fitting = [folder for folder, name in named.items() if spec.configuration in (None, name)]
    if len(fitting) != 1:
        there = ", ".join(folder.name for folder in found)
        raise SpecError(
            f"{spec.path}: got configuration {spec.configuration}, expected that of one of these models: {there}\n"
            "name its folder and its configuration"
        )
    return fitting[0], named[fitting[0]]


def _unpacked(file: Path) -> Path:
    """The folder a zip was unpacked to, now if never before."""
    if not zipfile.is_zipfile(file):
        raise CorruptError(f"{file} is no zip file, or it is cut off\nexpected a model folder, or what nnU-Net exports")
    home = local_home() / "models"
    folder = home / sha256_of_file(file)[:16]
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=home) as partial:
        try:
            with zipfile.ZipFile(file) as archive:
                _unpack(archive, file, Path(partial, "model"), home)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError) as e:
            raise CorruptError(f"{file} cannot be unpacked: {e}\nget the file again") from e
        Path(partial, "model").mkdir(exist_ok=True)
        try:
            os.rename(Path(partial, "model"), folder)
        except OSError:
            if not folder.is_dir():  # another process has unpacked the same meanwhile
                raise
    return folder


def _unpack(archive: zipfile.ZipFile, file: Path, folder: Path, home: Path) -> None:
    members = [m for m in archive.infolist() if _WANTED.fullmatch(m.filename)]
    size, free = sum(m.file_size for m in members), shutil.disk_usage(home).free
    if size > free:
        raise DiskSpaceError(
            f"not enough disk space to unpack {file} into {home}\n  got      {free / 1e9:.3f} GB free\n"
            f"  expected {size / 1e9:.3f} GB\nfree some space, or choose another folder with {HOME_VARIABLE}"
        )
    for member in members:
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename:
            raise CorruptError(f"{file} holds {member.filename!r}, which would be written outside its folder")
        target = folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as f:
                shutil.copyfileobj(source, f)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as e:
            raise CorruptError(f"{member.filename} in {file} cannot be unpacked: {e}\nget the file again") from e
        except OSError as e:  # of a damaged bzip2 stream too, or a name no file can have
            if e.errno in NO_ROOM | {errno.EACCES, errno.EROFS}:
                raise
            raise CorruptError(f"{member.filename!r} in {file} cannot be unpacked: {e}\nget the file again") from e
