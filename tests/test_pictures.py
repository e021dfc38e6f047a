"""Pictures of every kind that people have, against nnU-Net's reader, which is skimage's: Pillow and tifffile."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastnnunet.errors import ImageError
from fastnnunet.evaluate.segmentations import read_segmentation
from fastnnunet.images.io import image_io

GREY = np.random.default_rng(0).integers(0, 255, (40, 44)).astype(np.uint8)
RGB = np.stack([GREY, 255 - GREY, GREY // 2], -1)
RGBA = np.dstack([RGB, GREY])
WIDE = GREY.astype(np.uint16) * 200
PALETTE = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
Write = Callable[[Path], Any]


def _pillow(image: Any, **options: Any) -> Write:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return lambda file: picture.save(file, **options)


def _itk(pixels: np.ndarray) -> Write:
    return lambda file: sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=pixels.ndim == 3), str(file))


def _tiff(pixels: np.ndarray, **options: Any) -> Write:
    return lambda file: tifffile.imwrite(file, pixels, **options)


def _gamma() -> PngInfo:
    info = PngInfo()
    info.add(b"gAMA", (45455).to_bytes(4, "big"))
    return info


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn, which skimage leaves alone
    return exif


PNG: dict[str, Write] = {
    "grey": _pillow(GREY),
    "16 bits": _pillow(WIDE),
    "1 bit": _pillow(Image.fromarray(GREY).convert("1")),
    "palette": _pillow(PALETTE),
    "palette of 4 bits": _pillow(PALETTE, bits=4),
    "palette, one transparent": _pillow(PALETTE, transparency=3),
    "palette with alpha": _pillow(PALETTE, transparency=bytes([0, 50, 255])),
    "rgb": _pillow(RGB),
    "rgba": _pillow(RGBA),
    "grey, one transparent": _pillow(GREY, transparency=5),
    "16 bits, one transparent": _pillow(WIDE, transparency=400),
    "rgb, one transparent": _pillow(RGB, transparency=(1, 2, 3)),
    "rgb of 16 bits": _itk(RGB.astype(np.uint16) * 200),
    "rgba of 16 bits": _itk(RGBA.astype(np.uint16) * 200),
    "gamma": _pillow(GREY, pnginfo=_gamma()),
    "exif": _pillow(RGB, exif=_turned()),
    "jpeg": _pillow(RGB, format="JPEG", exif=_turned()),
    "grey jpeg": _pillow(GREY, format="JPEG"),
    "cmyk jpeg": _pillow(Image.fromarray(RGB).convert("CMYK"), format="JPEG"),
    "lzma tiff called png": _tiff(GREY, compression="lzma"),
    "tiff called png": _pillow(RGB, format="TIFF", compression="tiff_lzw"),
    "bmp called png": _pillow(RGB, format="BMP"),
    "webp called png": _pillow(RGB, format="WEBP", lossless=True),
}
BMP: dict[str, Write] = {mode: _pillow(Image.fromarray(RGB).convert(mode)) for mode in ("1", "L", "P", "RGB", "RGBA")}
TIFF: dict[str, Write] = {
    **{c: _tiff(GREY, compression=c) for c in ("lzw", "zlib", "packbits", "zstd", "lzma", "jpeg", "jpeg2000")},
    **{f"rgb {c}": _tiff(RGB, photometric="rgb", compression=c) for c in ("lzw", "zlib", "jpeg", "webp")},
    "ycbcr jpeg": _tiff(RGB, photometric="ycbcr", compression="jpeg"),
    "predictor": _tiff(WIDE, compression="lzw", predictor=True),
    "float predictor": _tiff(GREY / np.float32(7), compression="zlib", predictor=3),
    "tiled": _tiff(np.tile(GREY, (4, 4)), tile=(64, 64)),
    "tiled rgb": _tiff(np.tile(RGB, (4, 4, 1)), tile=(64, 64), photometric="rgb", compression="zlib"),
    "planar": _tiff(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
    "planar tiles": _tiff(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", tile=(16, 16)),
    "planar rgba": _tiff(RGBA.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", extrasamples=[2]),
    "rgba": _tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]),
    "cmyk": _tiff(RGBA, photometric="separated"),
    "three pages": _tiff(np.stack([GREY, 255 - GREY, GREY // 2])),
    "big endian": _tiff(WIDE, byteorder=">"),
    "bigtiff": _tiff(RGB, bigtiff=True, photometric="rgb"),
    "white is zero": _tiff(GREY, photometric="miniswhite"),
    "palette": _tiff(GREY, photometric="palette", colormap=np.arange(768, dtype=np.uint16).reshape(3, 256)),
    "1 bit": _tiff(GREY > 100),
    "fax": _pillow(Image.fromarray(GREY).convert("1"), compression="group4"),
    "imagej": _tiff(WIDE, imagej=True),
    "ome": _tiff(RGB, photometric="rgb", ome=True),
    **{str(np.dtype(t)): _tiff(GREY.astype(t)) for t in ("f2", "f4", "f8", "i1", "i4", "u4", "i8")},
}
KINDS = [(ending, name) for ending, kinds in ((".png", PNG), (".bmp", BMP), (".tif", TIFF)) for name in kinds]
WRITERS = {".png": PNG, ".bmp": BMP, ".tif": TIFF}


@pytest.mark.parametrize(("ending", "name"), KINDS)
def test_every_kind_as_nnunet(ending: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / f"a_0000{ending}"
    WRITERS[ending][name](file)
    expected, expected_properties = NaturalImage2DIO().read_images([str(file)])
    got, properties = image_io("NaturalImage2DIO").read([file])
    assert (got.dtype, properties) == (np.float32, expected_properties)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        (".png", _pillow(np.stack([GREY, 255 - GREY], -1))),  # grey with alpha: two channels
        (".png", _pillow(GREY, save_all=True, append_images=[Image.fromarray(GREY)])),
        (".png", _pillow(PALETTE, format="GIF")),
        (".tif", _pillow(GREY, format="PNG")),
        (".tif", _tiff(np.stack([GREY, GREY]))),
        (".tif", _tiff(np.stack([GREY, GREY], -1), planarconfig="contig")),
        (".tif", _tiff(np.stack([GREY] * 5)[None])),
    ],
    ids=["grey alpha", "animation", "gif", "png called tif", "two pages", "two channels", "4d"],
)
def test_what_nnunet_refuses_is_refused(ending: str, write: Write, tmp_path: Path) -> None:
    file = tmp_path / f"a_0000{ending}"
    write(file)
    with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind
        NaturalImage2DIO().read_images([str(file)])
    with pytest.raises(ImageError, match="a_0000"):
        image_io("NaturalImage2DIO").read([file])


def test_names_decide_as_they_do_in_skimage(tmp_path: Path) -> None:
    for name, write in (("a.PNG", PNG["rgb"]), ("a.TIFF", TIFF["tiled"]), ("a.Tif", TIFF["planar"])):
        _pillow(RGB)(tmp_path / "a.png")
        file = tmp_path / name
        write(file.with_suffix(".png" if name == "a.PNG" else ".tif"))
        file.with_suffix(".png" if name == "a.PNG" else ".tif").rename(file)
        expected, _ = NaturalImage2DIO().read_images([str(file)])
        np.testing.assert_array_equal(image_io("NaturalImage2DIO").read([file])[0], expected)


def test_a_flipped_bit_of_a_png_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.png"
    _pillow(GREY, compress_level=0)(file)  # stored as it is: only the checksums tell
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ImageError, match="a_0000"):
        image_io("NaturalImage2DIO").read([file])


def test_a_picture_above_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is against small files that become large; this one is as large as it says."""
    file = tmp_path / "a_0000.png"
    _pillow(RGB)(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert image_io("NaturalImage2DIO").read([file])[0].shape == (3, 1, 40, 44)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_codec_that_is_missing_is_told(tmp_path: Path) -> None:
    """In a process where imagecodecs cannot be imported, as in the base install."""
    _tiff(GREY, compression="lzw")(tmp_path / "lzw.tif")
    _tiff(GREY, compression="zlib", tile=(16, 16))(tmp_path / "zlib.tif")
    code = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from pathlib import Path\n"
        "from fastnnunet.errors import ImageError\n"
        "from fastnnunet.images.pictures.natural import read_picture\n"
        "print(read_picture(Path('zlib.tif')).sum())\n"
        "try: read_picture(Path('lzw.tif'))\n"
        "except ImageError as e: print(e)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == str(GREY.sum())
    assert "lzw.tif" in done.stdout
    assert "pip install 'fastnnunet[images]'" in done.stdout


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_label_pictures_are_read_for_scoring(ending: str, tmp_path: Path) -> None:
    labels = (GREY // 100)[None]
    image_io("NaturalImage2DIO").write(labels, tmp_path / f"s{ending}", {})
    got = read_segmentation(tmp_path / f"s{ending}")
    np.testing.assert_array_equal(got.labels_zyx, labels)
    assert got.spacing_mm == pytest.approx((1.0, 1.0, 1.0))
    WRITERS[ending]["RGB" if ending == ".bmp" else "rgb" if ending == ".png" else "tiled rgb"](tmp_path / f"c{ending}")
    with pytest.raises(ImageError, match=rf"c\{ending}"):
        read_segmentation(tmp_path / f"c{ending}")
