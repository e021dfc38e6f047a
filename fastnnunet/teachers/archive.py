"""The zip a published model comes in, unpacked once: descriptions and checkpoints, nothing else."""

import errno
import lzma
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from fastnnunet.errors import NO_ROOM, CorruptError, DiskSpaceError, FastnnUNetError, NotFoundError
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.home import HOME_VARIABLE, local_home
from fastnnunet.system.words import size_text

_WANTED = re.compile(r"(?!__MACOSX/)(.*/)?(plans\.json|dataset(_fingerprint)?\.json|fold_[^/]+/[^/.][^/]*\.pth)")
_OF_VERSION_1 = re.compile(r"(.*/)?(plans\.pkl|[^/]+\.model(\.pkl)?)")


def unpacked(file: Path) -> Path:
    """The folder a zip was unpacked to, now if never before.

    Raises CorruptError, NotFoundError where it holds no model, DiskSpaceError.
    """
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
        except FastnnUNetError:
            raise
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError) as e:
            raise CorruptError(f"{file} cannot be unpacked: {e}\nget the file again") from e
        try:
            os.rename(Path(partial, "model"), folder)
        except OSError:
            if not folder.is_dir():  # another process has unpacked the same meanwhile
                raise
    return folder


def _unpack(archive: zipfile.ZipFile, file: Path, folder: Path, home: Path) -> None:
    members = [m for m in archive.infolist() if _WANTED.fullmatch(m.filename)]
    if not any(PurePosixPath(m.filename).name == "plans.json" for m in members):
        raise no_model(file, archive.namelist())
    size, free = sum(m.file_size for m in members), shutil.disk_usage(home).free
    if size > free:
        raise DiskSpaceError(
            f"not enough disk space to unpack {file} into {home}\n  got      {size_text(free)} free\n"
            f"  expected {size_text(size)}\nfree some space, or choose another folder with {HOME_VARIABLE}"
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


def no_model(place: Path, names: Iterable[str]) -> NotFoundError:
    """What to say of a zip or folder with files of these names and no plans.json."""
    if any(map(_OF_VERSION_1.fullmatch, names)):
        return NotFoundError(
            f"{place} holds a model of nnU-Net v1, which nnU-Net v2 does not read either\n"
            "ask for one trained with nnU-Net v2: it has a plans.json"
        )
    if not place.exists():
        return NotFoundError(
            f"{place} does not exist\nexpected the folder of an nnU-Net model, which holds fold_0, or the zip of one"
        )
    mend = (
        "name the folder that holds fold_0" if place.is_dir() else "export it again with nnUNetv2_export_model_to_zip"
    )
    return NotFoundError(f"no nnU-Net model at {place}: there is no plans.json\n{mend}")
