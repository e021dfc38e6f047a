"""A zip of a DICOM series: refused by its directory before it is unpacked, then unpacked under names of our own."""

import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from fastnnunet.errors import NO_ROOM
from fastnnunet.service.refusals import RefusedError, no_room

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END_MAGIC = b"PK\x05\x06"
_LONGEST_COMMENT = 1 << 16
_ENTRY_BYTES = 1024  # of the directory, for one file: names of DICOM files are short
_NO_SLICE = (
    "file {} of the zip is no DICOM file, expected the slices of one series; other images are sent without a zip"
)
_PIECE_BYTES = 1 << 18
_PASSED_OVER = re.compile(r"(?i)(.*/)?(__MACOSX/.*|\.[^/]*|DICOMDIR|Thumbs\.db)")


def check_zip(file: Path, *, most_files: int, most_bytes: int) -> int:
    """Bytes of all its files, as its directory claims.

    Raises RefusedError for anything but an ordinary zip of plain files.
    """
    _check_end(file, most_files)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as e:
        raise RefusedError(422, "the zip is damaged: its directory cannot be read") from e
    if len(members) > most_files:
        raise RefusedError(413, f"the zip holds {len(members)} files, expected at most {most_files}")
    for member in members:
        _check_member(member)
    total = sum(member.file_size for member in members)
    if total > most_bytes:
        raise RefusedError(413, f"the zip would be {total} bytes when unpacked, expected at most {most_bytes}")
    if not wanted(members):
        raise RefusedError(422, "the zip holds no file, expected the slices of one DICOM series")
    return total


def _check_end(file: Path, most_files: int) -> None:
    """The end of a zip tells how large its directory is: one of millions of entries is not read."""
    size = file.stat().st_size
    with file.open("rb") as f:
        f.seek(max(0, size - _END.size - _LONGEST_COMMENT))
        tail = f.read()
    at = tail.rfind(_END_MAGIC)
    if at < 0 or at + _END.size > len(tail):
        raise RefusedError(422, "the zip is damaged or cut off: it has no end")
    _, disk, first_disk, here, entries, directory_bytes, start, _ = _END.unpack_from(tail, at)
    if disk or first_disk or here != entries or 0xFFFF in (here, entries) or 0xFFFFFFFF in (directory_bytes, start):
        raise RefusedError(422, "the zip is of several parts or of the 64-bit kind, expected an ordinary one")
    if entries > most_files:
        raise RefusedError(413, f"the zip holds {entries} files, expected at most {most_files}")
    if directory_bytes > (most_files + 1) * _ENTRY_BYTES:
        raise RefusedError(413, "the directory of the zip is too large")


def _check_member(member: zipfile.ZipInfo) -> None:
    name = member.orig_filename
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in name or "\0" in name:
        raise RefusedError(422, "the zip holds a name that leads out of its folder")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise RefusedError(422, "the zip holds a link or a device, expected plain files")
    if member.flag_bits & 0x1:
        raise RefusedError(422, "the zip is encrypted, expected a plain one")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RefusedError(422, "the zip is compressed in an unusual way, expected deflate or none")


def wanted(members: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The files that should be slices: folders, what systems leave beside them and DICOMDIR are none."""
    return [m for m in members if not m.is_dir() and not _PASSED_OVER.fullmatch(m.filename)]


def unpack(file: Path, folder: Path, *, most_bytes: int) -> None:
    """Write the slices of a zip that was checked into a new folder.

    Raises RefusedError, also where it lied or the disk is full.
    """
    folder.mkdir()
    left = most_bytes
    try:
        with zipfile.ZipFile(file) as archive:
            for number, member in enumerate(wanted(archive.infolist()), start=1):
                with archive.open(member) as source, (folder / f"slice-{number:05d}.dcm").open("wb") as f:
                    first = True
                    while piece := source.read(_PIECE_BYTES):
                        if first and piece[128:132] != b"DICM":
                            raise RefusedError(415, _NO_SLICE.format(number))
                        first = False
                        left -= len(piece)
                        if left < 0:
                            raise RefusedError(413, f"the zip is more than {most_bytes} bytes when unpacked")
                        f.write(piece)
                if first:
                    raise RefusedError(415, f"file {number} of the zip is empty, expected DICOM slices")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as e:
        raise RefusedError(422, "the zip is damaged: a file in it cannot be unpacked") from e
    except OSError as e:
        if e.errno not in NO_ROOM:
            raise
        raise no_room() from e
