"""A folder of DICOM slices as the zip that the service takes: the slices alone, under names that say nothing."""

import zipfile
from pathlib import Path

from fastnnunet.errors import ImageError
from fastnnunet.images.dicom.series import is_dicom_file
from fastnnunet.specs.checks.listing import regular_files


def zip_series(folder: Path, file: Path) -> None:
    """Put the DICOM files directly in a folder into a zip.

    Raises ImageError where there is none, or more than the service takes: 65535 files or 4 GiB.
    """
    slices = [folder / name for name in regular_files(folder) if name.upper() != "DICOMDIR"]
    slices = [place for place in slices if is_dicom_file(place)]
    if not slices:
        raise ImageError(f"{folder} holds no DICOM files, expected the slices of one series")
    # voxels hardly shrink, and the connection is rarely what takes longest
    try:
        with zipfile.ZipFile(
            file,
            "w",
            zipfile.ZIP_DEFLATED,
            allowZip64=False,
            compresslevel=1,
            strict_timestamps=False,  # a zip tells no day before 1980
        ) as archive:
            for number, place in enumerate(slices, start=1):
                archive.write(place, f"{number:05d}.dcm")
    except zipfile.LargeZipFile as e:
        raise ImageError(f"{folder} is too large to be sent as an ordinary zip, expected fewer than 4 GiB") from e
