"""A folder of images without labels, named as nnU-Net names them: CASE_0000.nii.gz, CASE_0001.nii.gz, ..."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastnnunet.errors import ImageError, NotFoundError, printable
from fastnnunet.images.pictures.natural import read_picture
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.checks.listing import examples, passed_over, regular_files

_log = logging.getLogger(__name__)
_CHANNEL = re.compile(r"(.+)_(\d{4})", re.DOTALL)  # a name may have a line break
_PICTURES = (".png", ".bmp", ".tif")  # endings of nnU-Net's NaturalImage2DIO
_BESIDE = (".json", ".raw", ".zraw", ".img", ".hdr")  # files that belong to images without being one

FileStamp = tuple[int, int, str]  # size in bytes, time of last change in ns, SHA-256


def find_images(
    folder: Path, file_ending: str, num_channels: int, *, tell: bool = True, option: str = "--images"
) -> dict[str, tuple[Path, ...]]:
    """Case id -> its files in the order of their channels; hidden files are passed over, what else there is
    is logged as a warning (`tell`). `option` is what the folder was given with.

    Raises NotFoundError when there is no such folder or no image in it, ImageError naming every file without channel
    number, every case whose channels are not 0 to `num_channels` - 1, and every name nnU-Net's own files would take.
    A picture may hold several channels (RGB): where the first that has to does, whoever reads the others has to count.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{option}: {folder} is not a folder\nexpected a folder of CASE_0000{file_ending} ...")
    names = regular_files(folder, file_ending)
    stems = [name.removesuffix(file_ending) for name in names]
    beside = {stem + ending for stem in (*stems, *(stem[:-5] for stem in stems)) for ending in _BESIDE}
    others = passed_over(folder, {*names, *beside}, file_ending)
    if not names:
        found = examples(sorted(p.name for p in folder.iterdir()))
        raise NotFoundError(
            f"{option}: no image in {folder}\n  got      {found or 'an empty folder'}\n"
            f"  expected files named CASE_0000{file_ending}, as the teacher's data set has them"
            + "".join(f"\n  - {kind}" for kind in others)
        )
    for kind in others if tell else ():
        _log.warning("%s: %s: not used: %s", option, printable(folder), kind)
    problems: dict[str, str] = {}
    channels: dict[str, dict[int, Path]] = {}
    for name in names:
        match = _CHANNEL.fullmatch(stem := name.removesuffix(file_ending))
        if match is None:
            problems[name] = f"no channel number in the name, expected {stem}_0000{file_ending}"
        else:
            channels.setdefault(match[1], {})[int(match[2])] = folder / name
    in_pictures: bool | None = None  # whether the channels that have no file of their own are in those there are
    for case, files in channels.items():
        is_short = file_ending in _PICTURES and sorted(files) == list(range(len(files))) and len(files) < num_channels
        if is_short and in_pictures is None:
            in_pictures = _channels_of(files.values()) == num_channels
        if case.endswith("_seg"):
            problems[case] = "a name that ends in _seg is one nnU-Net gives to segmentations; rename the files"
        elif sorted(files) != list(range(num_channels)) and not (is_short and in_pictures):
            got = ", ".join(f"_{c:04d}" for c in sorted(files))
            wanted = "_0000" if num_channels == 1 else f"_0000 to _{num_channels - 1:04d}"
            problems[case] = f"got channels {got}, expected {wanted}"
    if problems:
        raise unusable(folder, problems)
    return {case: tuple(files[c] for c in sorted(files)) for case, files in sorted(channels.items())}


def _channels_of(pictures: Iterable[Path]) -> int:
    """How many channels pictures have together; 0 where one cannot be read, which its reader tells in full."""
    try:
        return sum(1 if pixels.ndim == 2 else pixels.shape[-1] for pixels in map(read_picture, pictures))
    except ImageError:
        return 0


def unusable(folder: Path, problems: Mapping[str, str]) -> ImageError:
    """One error that names all images that cannot be used."""
    return ImageError(
        f"{len(problems)} image(s) in {folder} cannot be used\n"
        + "\n".join(f"  - {printable(name)}: {problem}" for name, problem in sorted(problems.items()))
        + "\nmend or remove them and run the same command again"
    )


def stamps_of(files: Sequence[Path]) -> dict[str, FileStamp]:
    """File name -> its stamp, from reading the files."""
    return {f.name: (f.stat().st_size, f.stat().st_mtime_ns, sha256_of_file(f)) for f in files}


def unchanged(files: Sequence[Path], stamps: Mapping[str, FileStamp]) -> bool:
    """Whether files are those `stamps` were made of; a file is only read where its size or time does not say so."""
    if [f.name for f in files] != list(stamps):
        return False
    for file in files:
        size, changed_ns, sha256 = stamps[file.name]
        status = file.stat()
        if status.st_size != size or (status.st_mtime_ns != changed_ns and sha256_of_file(file) != sha256):
            return False
    return True
