"""nnU-Net's Tiff3DIO: three-dimensional TIFF files through tifffile, their spacing in a JSON file beside them."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import CorruptError, FastnnUNetError, ImageError
from fastnnunet.images.checks import ImageSource, check_same, check_spacing, smallest_dtype, stack_channels
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.images.stored import PICTURE_RATIO, SMALL_BYTES, check_claim, open_stored
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.system.files import atomic_output

TIFF_ENDINGS = (".tif", ".tiff")
_UNCOMPRESSED = 1
_CONTIGUOUS, _SEPARATE = 1, 2
_log = logging.getLogger(__name__)


class Tiff3DIO:
    """`CASE_0000.tif`, `CASE_0001.tif`, ... and `CASE.json` with `{"spacing": [z, y, x]}`, without which it is 1."""

    def read(self, files: Sequence[ImageSource]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        volumes = [_read_one(file)[None] for file in files]
        check_same(files, [{"shape": v.shape[1:]} for v in volumes])
        first = files[0]
        # `_0000` is cut off by its length, as nnU-Net does
        spacing = _read_spacing(first, first.parent / f"{first.name[: -len(_ending(first)) - 5]}.json")
        return stack_channels(files, volumes), {"spacing": spacing}

    def read_segmentation(self, file: Path) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        labels = _read_one(file)[None]
        return stack_channels([file], [labels]), {"spacing": _read_spacing(file, _json_beside(file))}

    def write(self, segmentation_ZYX: npt.NDArray[Any], file: Path, properties: dict[str, Any]) -> None:
        """Write the spacing to the JSON file of the same name, then the label map: where that is, both are."""
        import tifffile

        with atomic_output(_json_beside(file)) as partial:
            partial.write_text(json.dumps({"spacing": properties["spacing"]}, indent=4))
        with atomic_output(file) as partial:
            try:
                tifffile.imwrite(partial, data=smallest_dtype(segmentation_ZYX), compression="zlib")
            except ValueError as e:
                raise FastnnUNetError(f"cannot write {file}: {e}") from e


def _read_one(file: ImageSource) -> npt.NDArray[Any]:
    """Voxels (z, y, x). Raises ImageError."""
    if isinstance(file, DicomSeries) or _ending(file).lower() not in TIFF_ENDINGS:
        raise ImageError(f"{file}: this model reads TIFF files (.tif, .tiff); convert the image first")
    voxels = read_tiff(file)
    if voxels.ndim != 3:
        raise ImageError(f"{file} has shape {voxels.shape}, expected three dimensions (z, y, x)")
    return voxels


def read_tiff(file: Path) -> npt.NDArray[Any]:
    """The first series of a TIFF file in tifffile's order of axes.

    Raises ImageError when the file is missing, damaged, truncated or no TIFF, or when its compression needs a package
    that is not installed.
    """
    import tifffile

    with open_stored(file) as stored:
        stored_bytes = stored.stored_bytes
    try:
        with _complaints() as complaints, tifffile.TiffFile(file) as tiff:
            len(tiff.pages)  # follows all pages, which finds a circle; looking for series would walk in it for ever
            series = tiff.series[0]
            packed = any(page is not None and int(page.compression) != _UNCOMPRESSED for page in series.pages[:1])
            check_claim(file, series.nbytes, stored_bytes, ratio=PICTURE_RATIO if packed else 1, slack=SMALL_BYTES)
            for page in series.pages:
                if page is not None:
                    _check_segments(file, page, stored_bytes)
            voxels = series.asarray()
    except ImageError:
        raise
    # tifffile raises whatever its parts and codecs raise; DeflateError and its like are RuntimeErrors
    except Exception as e:
        if "requires the 'imagecodecs'" in str(e):
            raise ImageError(f"cannot read {file}: {e}\ninstall it: pip install 'fastnnunet[images]'") from e
        raise ImageError(f"cannot read {file}: {e}\nexpected a TIFF file; export it again") from e
    if complaints:
        raise ImageError(f"{file} is truncated or damaged ({complaints[0]}); copy or export it again")
    return voxels


def _check_segments(file: Path, page: Any, stored_bytes: int) -> None:
    """Raises ImageError unless every strip or tile is in the file, or a tile left out on purpose.

    tifffile leaves memory as it finds it where one is not, or where its planes are arranged in no known way.
    """
    if (planes := int(page.keyframe.planarconfig)) not in (_CONTIGUOUS, _SEPARATE):
        raise ImageError(f"{file} is damaged: its planar configuration is {planes}; export it again")
    expected, got = math.prod(page.chunked), len(page.dataoffsets)
    if got < expected or len(page.databytecounts) < got:
        raise ImageError(f"{file} is damaged: {got} of {expected} strips or tiles are there; export it again")
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset + size > stored_bytes or (offset == 0) != (size == 0) or (size == 0 and got == 1):
            raise ImageError(
                f"{file} is truncated or damaged: a strip or tile has {size} bytes from {offset} on, expected them "
                f"within {stored_bytes}; copy or export it again"
            )


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What tifffile logs as errors: pages it cannot find are left out of an image without an exception."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("tifffile")
    handler = Collect(logging.ERROR)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def _read_spacing(file: ImageSource, beside: Path) -> Any:
    """Spacing (z, y, x) as the JSON file has it. Raises ImageError when that is no such file."""
    if not beside.is_file():
        _log.warning("no spacing for %s (expected %s); 1, 1, 1 is assumed", file.name, beside)
        return (1, 1, 1)
    try:
        spacing = read_json_object(beside)["spacing"]
        numbers = [float(s) for s in spacing]
    except CorruptError as e:
        raise ImageError(f'the spacing of {file.name} is damaged: {e}\nexpected {{"spacing": [z, y, x]}}') from e
    except (ValueError, KeyError, TypeError) as e:
        raise ImageError(f'{beside} is damaged ({e!r}); expected {{"spacing": [z, y, x]}}') from e
    if len(numbers) != 3:
        raise ImageError(f"{beside} has a spacing of {len(numbers)} numbers, expected three (z, y, x)")
    check_spacing(beside, numbers)
    return numbers


def _ending(file: ImageSource) -> str:
    return "." + file.name.rpartition(".")[2]


def _json_beside(file: Path) -> Path:
    return file.with_name(f"{file.name[: -len(_ending(file))]}.json")
