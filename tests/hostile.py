"""Small images of every format, damaged in numbered ways, and a process that reads them one after the other.

`damaged(kind, number)` is the same bytes on every machine, so what a test names can be made again.
"""

import gzip
import hashlib
import io
import json
import random
import struct
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image

Files = dict[str, bytes]  # of one image: ending -> content, that of the file to be read first
READERS = {"nib": "NibabelIO", "picture": "NaturalImage2DIO", "tiff3d": "Tiff3DIO"}  # by the begin of the kind


def voxels(shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


def _nifti(
    dtype: type = np.int16, shape: tuple[int, ...] = (7, 6, 5), slope: float | None = None, two: bool = False
) -> bytes:
    kind = nibabel.Nifti2Image if two else nibabel.Nifti1Image
    image = kind(voxels(shape).astype(dtype), np.diag([1.0, 2.0, 3.0, 1.0]))
    image.set_qform(image.affine, 1)
    if slope:
        image.header.set_slope_inter(slope, 1.0)
    return image.to_bytes()


def _itk(ending: str, *, compressed: bool = False, folder: Path) -> Files:
    image = sitk.GetImageFromArray(voxels().astype(np.int16))
    image.SetSpacing((1.0, 2.0, 3.0))
    for old in folder.iterdir():
        old.unlink()
    sitk.WriteImage(image, str(folder / f"seed{ending}"), compressed)
    names = sorted((p.name for p in folder.iterdir()), key=lambda name: not name.endswith(ending))
    return {name.removeprefix("seed"): (folder / name).read_bytes() for name in names}


def _pillow(image: Image.Image, **options: object) -> bytes:
    into = io.BytesIO()
    image.save(into, **options)
    return into.getvalue()


def _tiff(pixels: np.ndarray, **options: object) -> bytes:
    into = io.BytesIO()
    tifffile.imwrite(into, pixels, **options)
    return into.getvalue()


def seeds(folder: Path) -> dict[str, Files]:
    """Kind -> a valid image. `folder` is an empty one that may be used."""
    grey, rgb = voxels((24, 20)), voxels((24, 20, 3))
    palette = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    nifti = _nifti()
    pair = nibabel.Nifti1Pair(voxels((7, 6, 5)).astype(np.int16), np.diag([1.0, 2.0, 3.0, 1.0]))
    holders = nibabel.Nifti1Pair.make_file_map({"header": io.BytesIO(), "image": io.BytesIO()})
    pair.to_file_map(holders)
    header, data = (holders[part].fileobj.getvalue() for part in ("header", "image"))
    return {
        "nifti": {".nii": nifti},
        "nifti gz": {".nii.gz": gzip.compress(nifti, mtime=0)},
        "nifti scaled": {".nii": _nifti(slope=0.5)},
        "nifti scaled gz": {".nii.gz": gzip.compress(_nifti(slope=0.5), mtime=0)},
        "nifti float": {".nii": _nifti(np.float32)},
        "nifti 2d": {".nii": _nifti(shape=(7, 6))},
        "nifti 4d": {".nii": _nifti(shape=(7, 6, 5, 2))},
        "nifti pair": {".hdr": header, ".img": data},
        "nib": {".nii": nifti},
        "nib gz": {".nii.gz": gzip.compress(nifti, mtime=0)},
        "nib scaled": {".nii": _nifti(slope=0.5)},
        "nib two": {".nii": _nifti(two=True)},
        "nrrd": _itk(".nrrd", folder=folder),
        "nrrd gz": _itk(".nrrd", compressed=True, folder=folder),
        "nrrd detached": _itk(".nhdr", folder=folder),
        "mha": _itk(".mha", folder=folder),
        "mha zlib": _itk(".mha", compressed=True, folder=folder),
        "mhd": _itk(".mhd", folder=folder),
        "gipl": _itk(".gipl", folder=folder),
        "picture png": {".png": _pillow(Image.fromarray(grey), format="PNG")},
        "picture png rgb": {".png": _pillow(Image.fromarray(rgb), format="PNG")},
        "picture png palette": {".png": _pillow(palette, format="PNG")},
        "picture jpeg": {".png": _pillow(Image.fromarray(rgb), format="JPEG")},
        "picture bmp": {".bmp": _pillow(Image.fromarray(grey), format="BMP")},
        "picture tiff": {".tif": _tiff(grey)},
        "picture tiff tiles": {".tif": _tiff(rgb, tile=(16, 16), compression="zlib", photometric="rgb")},
        "picture tiff jpeg": {".tif": _tiff(rgb, compression="jpeg", photometric="ycbcr")},
        "picture tiff lzw": {".tif": _tiff(grey, compression="lzw")},
        "tiff3d": {".tif": _tiff(voxels())},
        "tiff3d zlib": {".tif": _tiff(voxels(), compression="zlib", metadata=None)},
    }


_NUMBERS = (b"999999999", b"-1", b"0", b"nan", b"inf", b"1e30", b"4294967296", b"18446744073709551615", b"3", b"")
_WORDS = (-1, 0, 1, 2, 255, 256, 32767, -32768)
_DOUBLE_WORDS = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FC00000, 0x7F800000, 0, 1, 0x100)
# where a NIfTI-1 header has something to lie about: dim, datatype, pixdim, offset and slope, codes, quaternion, sform
_FIELDS = ("40h", "42h", "44h", "46h", "48h", "70h", "72h", "76f", "80f", "84f", "88f", "108f", "112f", "116f", "123b",
           "252h", "254h", "256f", "268f", "280f", "296f", "312f", "328f", "0i", "344i")  # fmt: skip
_FLOATS = (0.0, -1.0, 1e30, 1e-30, float("nan"), float("inf"), 352.0, 1.5, 348.0)


def _mutate(rng: random.Random, content: bytes, *, is_nifti: bool) -> bytes:
    b = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if len(b) < 8:
            break
        head = min(len(b), 400 if rng.random() < 0.8 else len(b))
        at = rng.randrange(head)
        how = rng.randrange(10)
        if how == 0:
            b[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            b[at] = rng.choice((0, 255, 127, 128, 57, 45, 32, 10))
        elif how == 2:
            struct.pack_into("<h", b, min(at, len(b) - 2), rng.choice(_WORDS))
        elif how == 3:
            struct.pack_into(rng.choice("<>") + "I", b, min(at, len(b) - 4), rng.choice(_DOUBLE_WORDS))
        elif how == 4:
            del b[rng.randrange(len(b)) :]
        elif how == 5:
            b[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8)))
        elif how == 6:
            del b[at : at + rng.randrange(1, 8)]
        elif how == 7:
            b += bytes(rng.choice((0, 7))) * rng.choice((1, 100)) + bytes([rng.randrange(256)])
        elif is_nifti:
            field = rng.choice(_FIELDS)
            values = (
                _FLOATS if field[-1] == "f" else (0, 1, 3) if field[-1] == "b" else (*_WORDS, 3, 4, 16, 64, 128, 32)
            )
            if int(field[:-1]) + 4 <= len(b):
                struct.pack_into(f"<{field[-1]}", b, int(field[:-1]), rng.choice(values))
        elif digits := [i for i in range(head) if 48 <= b[i] < 58]:
            place = rng.choice(digits)
            b[place : place + 1] = rng.choice(_NUMBERS)
    return bytes(b)


def damaged(kind: str, number: int, seed: Files) -> Files:
    """A seed with one of its files changed: its header mostly, what is inside its gzip or the gzip itself."""
    rng = random.Random(f"{kind}/{number}")
    files = dict(seed)
    ending = rng.choice((*([next(iter(files))] * 3), *files))
    content = files[ending]
    is_nifti = kind.startswith(("nifti", "nib"))
    if ending.endswith(".gz") and rng.random() < 0.7:
        content = gzip.compress(_mutate(rng, gzip.decompress(content), is_nifti=is_nifti), mtime=0)
        if rng.random() < 0.2:
            content += rng.choice((bytes(9), b"more", gzip.compress(bytes(1 << 22), mtime=0)))
    else:
        content = _mutate(rng, content, is_nifti=is_nifti)
    files[ending] = content
    return files


def write(files: Files, folder: Path, name: str) -> Path:
    """The file that a reader is given. Detached voxels are called `seed`, as their headers say."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for ending, content in files.items():
        is_data = paths and ending in (".raw", ".raw.gz", ".zraw")
        paths.append(folder / f"{'seed' if is_data else name}{ending}")
        paths[-1].write_bytes(content)
    return paths[0]


def main(list_file: Path) -> None:
    """Read each image of a list of [reader, file]; a line of JSON for each: what we, then what nnU-Net made of it."""
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    from fastnnunet.errors import ImageError
    from fastnnunet.images.io import image_io

    warnings.simplefilter("ignore")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    theirs: dict[str, Callable[[], object]] = {}
    for reader, file in json.loads(list_file.read_text()):
        print(json.dumps({"file": file}), flush=True)
        told: dict[str, object] = {}
        try:
            array, properties = image_io(reader).read([Path(file)])
            told["ours"] = digest(array, properties)
        except ImageError as e:
            told["refused"] = str(e)
        except BaseException:
            told["traceback"] = traceback.format_exc()
        told["peak_bytes"] = _peak_bytes()
        if "ours" in told:
            if reader not in theirs:
                theirs[reader] = recursive_find_reader_writer_by_name(reader)
            try:
                told["nnunet"] = digest(*theirs[reader]().read_images([file]))  # type: ignore[attr-defined]
            except Exception as e:
                told["nnunet_refused"] = f"{type(e).__name__}: {e}"
        print(json.dumps(told), flush=True)


def _peak_bytes() -> int:
    """Of this process alone; getrusage begins with what the one that started it had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the memory of a process")


def digest(array: np.ndarray, properties: dict) -> list[object]:
    digest = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]
    geometry = json.dumps(properties, default=lambda a: np.asarray(a).tolist(), sort_keys=True)
    return [list(array.shape), digest, geometry.replace("-0.0", "0.0")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
