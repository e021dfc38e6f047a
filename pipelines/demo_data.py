"""A labelled data set out of nothing: procedural CT-like abdomens in nnU-Net's raw format.

Every case is a body with subcutaneous fat, muscle wall, ribs, bowel gas and five organs, each an ellipsoid bent by a
smooth random displacement. The scene is evaluated at SUPERSAMPLING^3 points per voxel; intensities are averaged over
them (partial volume), labels go to the majority. Then come organ texture, a smooth bias field and noise as coarse as
a reconstruction kernel leaves it. Lengths are in mm, axes (z, y, x) = (head, back, left); intensities in HU.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fastnnunet.errors import MismatchError

LABELS = {"background": 0, "liver": 1, "kidneys": 2, "spine": 3, "tumour": 4}
SPACINGS_MM = ((4.0, 3.4, 3.4), (4.6, 3.8, 3.8))  # of every three cases the third is from the second
SUPERSAMPLING = 2
RECIPE_VERSION = 2  # raise it whenever a voxel changes

Array = NDArray[np.float32]
Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One volume: int16 HU and uint8 labels, both (z, y, x)."""

    image_zyx: NDArray[np.int16]
    labels_zyx: NDArray[np.uint8]
    spacing_mm: Vector


def make_dataset(
    root: Path,
    dataset_id: int = 901,
    name: str = "ProceduralCT",
    n_train: int = 24,
    n_test: int = 6,
    seed: int = 20240901,
    progress: Callable[[float], None] | None = None,
) -> Path:
    """Write `root/DatasetXXX_NAME` (imagesTr, labelsTr, imagesTs, labelsTs, dataset.json) and return its path.

    A folder that already holds this very data set is left as it is. `progress` gets the share that is done.
    Raises MismatchError when the folder holds another data set.
    """
    folder = root / f"Dataset{dataset_id:03d}_{name}"
    recipe = {"version": RECIPE_VERSION, "seed": seed, "n_train": n_train, "n_test": n_test}
    if folder.exists():
        described = folder / "dataset.json"
        found = json.loads(described.read_text()).get("recipe") if described.is_file() else None
        if found != recipe:
            raise MismatchError(
                f"{folder} holds another data set\n  got      {found}\n  expected {recipe}\n"
                "delete that folder, or give another dataset_id"
            )
        return folder
    unfinished = root / f".{folder.name}.tmp"  # renamed when whole: a killed run leaves no half data set
    shutil.rmtree(unfinished, ignore_errors=True)
    for index in range(n_train + n_test):
        part = "Tr" if index < n_train else "Ts"
        _write_case(unfinished, part, f"ct_{index:03d}", make_case(seed, index))
        if progress is not None:
            progress((index + 1) / (n_train + n_test))
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": n_train,
        "file_ending": ".nii.gz",
        "recipe": recipe,
    }
    (unfinished / "dataset.json").write_text(json.dumps(description, indent=1))
    unfinished.replace(folder)
    return folder


def _write_case(folder: Path, part: str, case: str, content: Case) -> None:
    import SimpleITK as sitk

    for kind, ending, array in (
        ("images", "_0000.nii.gz", content.image_zyx),
        ("labels", ".nii.gz", content.labels_zyx),
    ):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(content.spacing_mm[::-1])
        image.SetOrigin([-s * (n - 1) / 2 for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)])
        (folder / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(folder / f"{kind}{part}" / f"{case}{ending}"), useCompression=True)


def make_case(seed: int, index: int) -> Case:
    """Case number `index`: the same voxels for the same two numbers, whatever was made before."""
    rng = np.random.default_rng([seed, index])
    spacing_mm = SPACINGS_MM[1 if index % 3 == 2 else 0]
    extent_mm = rng.uniform([76, 104, 118], [84, 110, 132])  # one window of the network that nnU-Net plans for it
    shape = tuple(int(n) for n in np.rint(extent_mm / spacing_mm))
    scene = _Scene(rng, _fine_grid(shape, spacing_mm))
    hu, labels = scene.paint()
    image = _pool(hu)
    fractions = np.stack([_pool((labels == v).astype(np.float32)) for v in LABELS.values()])
    labels_zyx = fractions.argmax(axis=0).astype(np.uint8)
    return Case(_acquire(rng, image, spacing_mm), labels_zyx, spacing_mm)


def _fine_grid(shape: tuple[int, ...], spacing_mm: Vector) -> tuple[Array, Array, Array]:
    """Open grids of sample positions relative to the centre of the volume."""
    axes = []
    for axis, (n, step) in enumerate(zip(shape, spacing_mm, strict=True)):
        line = ((np.arange(n * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - n / 2) * step
        axes.append(line.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)]))
    return axes[0], axes[1], axes[2]


def _pool(fine: Array) -> Array:
    """Mean over the SUPERSAMPLING^3 samples of each voxel."""
    k = SUPERSAMPLING
    z, y, x = (n // k for n in fine.shape)
    return fine.reshape(z, k, y, k, x, k).mean(axis=(1, 3, 5), dtype=np.float32)


def _acquire(rng: np.random.Generator, image: Array, spacing_mm: Vector) -> NDArray[np.int16]:
    """What the scanner adds: blur, shading of up to about 20 HU, noise with the grain of its kernel."""
    blurred = gaussian_filter(image, 0.35)
    shading = gaussian_filter(rng.normal(size=image.shape).astype(np.float32), [25 / s for s in spacing_mm])
    shading *= rng.uniform(8, 16) / shading.std()
    noise = gaussian_filter(rng.normal(size=image.shape).astype(np.float32), 0.5)
    noise *= rng.uniform(12, 22) / noise.std()
    inside = np.clip((blurred + 900) / 700, 0, 1)  # air scatters less
    return np.rint(np.clip(blurred + inside * shading + (0.3 + 0.7 * inside) * noise, -1024, 2000)).astype(np.int16)


class _Scene:
    """One patient: random pose, sizes and contrasts, painted organ over organ."""

    def __init__(self, rng: np.random.Generator, grid: tuple[Array, Array, Array]) -> None:
        self.rng = rng
        z, y, x = self._posed(grid)
        self.z, self.y, self.x = self._bent((z, y, x), 3.0, 70.0)
        self.hu = np.full(self.x.shape, -1000, np.float32)
        self.labels = np.zeros(self.x.shape, np.uint8)

    def paint(self) -> tuple[Array, NDArray[np.uint8]]:
        """Intensities and labels at the sample points."""
        u = self.rng.uniform
        wall = self._ellipsoid((0, 0, 0), (400, 47, 56))  # below 1 inside the body, which runs on above and below
        self._put(wall < 1, u(-115, -95))
        inner = wall * (1 + u(0.16, 0.3))
        self._put(inner < 1, u(45, 60))
        self._put(inner < 0.84, u(-105, -85))  # visceral fat
        self._ribs(inner)
        self._bowel()
        self._put(self._ellipsoid((u(12, 20), u(2, 8), u(27, 31)), (15, 13, 10)) < 1, u(118, 135))  # spleen, unlabelled
        self._liver_and_tumour()
        for side in (-1.0, 1.0):
            self._kidney(side)
        self._spine()
        return self.hu, self.labels

    def _liver_and_tumour(self) -> None:
        u = self.rng.uniform
        centre = (u(8, 16), u(-10, -5), u(-23, -19))
        liver = self._ellipsoid(centre, (u(28, 35), u(22, 27), u(22, 26)))
        lobe = self._ellipsoid((centre[0] + u(2, 8), -17, -2), (14, 11, u(18, 24)))
        texture = self._texture(6.0)
        self._put(np.minimum(liver, lobe) < 1, u(95, 115) + 6 * texture, "liver")
        size = u(10, 13)
        place = tuple(c + u(-0.42, 0.42) * r for c, r in zip(centre, (26, 18, 17), strict=True))
        tumour = self._ellipsoid((place[0], place[1], place[2]), (size, size * u(0.9, 1.15), size * u(0.9, 1.15)))
        self._put(tumour < 1, u(15, 40) + 6 * texture, "tumour")

    def _kidney(self, side: float) -> None:
        u = self.rng.uniform
        centre = (u(-24, -12), u(10, 16), side * u(26, 31))
        body = self._ellipsoid(centre, (u(20, 25), u(11, 13.5), u(10, 12.5)))
        hilum = self._ellipsoid((centre[0], centre[1], centre[2] - side * 11), (8, 7, 6.5))
        bean = (body < 1) & (hilum > 1)
        self._put(bean, u(150, 185), "kidneys")
        self._put(bean & (body < 0.3), u(110, 140))  # medulla

    def _spine(self) -> None:
        u = self.rng.uniform
        middle = 24 + 3 * np.sin(self.z / 40 + u(0, 6))
        across = self.x
        height = u(17, 21)
        phase = np.mod(self.z + u(0, height), height)
        back = self.y - middle
        vertebra = (across / u(10, 12)) ** 2 + (back / u(8, 9.5)) ** 2
        process = (np.abs(across) < 3.0) & (back > 8) & (back < u(15, 18)) & (phase < 0.6 * height)
        wings = (np.abs(across) < u(14, 18)) & (np.abs(back - 11) < 3.0) & (phase < 0.4 * height)
        canal = (across / 4.2) ** 2 + ((back - 10) / 3.6) ** 2
        marrow, cortex, disc = u(230, 280), u(420, 560), u(80, 105)
        bone = np.where(vertebra < 0.62, marrow + 25 * self._texture(3.0), cortex).astype(np.float32)
        self._put(vertebra < 1, np.where(phase < 4.0, disc, bone).astype(np.float32), "spine")
        self._put((vertebra >= 1) & (process | wings) & (canal > 1), cortex * 0.8, "spine")
        self._put((vertebra >= 1) & (canal <= 1), u(15, 40))
        self.labels[(vertebra >= 1) & (canal <= 1)] = 0
        aorta = (across + u(3, 7)) ** 2 + (self.y - middle + u(14, 16)) ** 2
        self._put((aorta < u(4.2, 5.2) ** 2) & (self.labels == 0), u(130, 190))

    def _ribs(self, inner: Array) -> None:
        slope = np.abs(self.x) * 0.25 - self.y * 0.3
        near = np.abs(np.mod(self.z + slope + self.rng.uniform(0, 20), 20) - 10) < 2.6
        self._put(near & (inner > 0.86) & (inner < 0.98) & (self.y < 40), self.rng.uniform(300, 450))

    def _bowel(self) -> None:
        u = self.rng.uniform
        for _ in range(int(self.rng.integers(4, 7))):
            loop = self._ellipsoid((u(-50, -14), u(-26, -6), u(-22, 30)), (u(7, 12), u(6, 9), u(7, 14)))
            self._put(loop < 1, u(25, 60))
            self._put(loop < u(0.05, 0.35), -800 if u(0, 1) < 0.5 else u(10, 35))

    def _put(self, mask: NDArray[np.bool_], hu: float | Array, label: str | None = None) -> None:
        self.hu = np.where(mask, np.float32(hu) if isinstance(hu, float | int) else hu, self.hu)
        if label is not None:
            self.labels[mask] = LABELS[label]

    def _ellipsoid(self, centre: Vector, radii: Vector) -> Array:
        """Squared distance in units of the radii: below 1 inside."""
        offsets = zip((self.z, self.y, self.x), centre, radii, strict=True)
        total: Array = np.asarray(sum(((axis - c) / r) ** 2 for axis, c, r in offsets))
        return total

    def _posed(self, grid: tuple[Array, Array, Array]) -> list[Array]:
        """Turn by up to 9 degrees about each axis, shift by up to 5 mm, scale each axis by up to 7 %."""
        matrix = np.eye(3)
        for a, b in ((1, 2), (0, 1), (0, 2)):
            angle = np.deg2rad(self.rng.uniform(-9, 9))
            turn = np.eye(3)
            turn[[a, b, a, b], [a, b, b, a]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
            matrix = matrix @ turn
        matrix = (matrix / self.rng.uniform(0.93, 1.07, 3)[:, None]).astype(np.float32)
        shift = self.rng.uniform(-5, 5, 3).astype(np.float32)
        return [sum((row[a] * grid[a] for a in range(3)), start=s) for row, s in zip(matrix, shift, strict=True)]

    def _bent(self, axes: Any, amplitude_mm: float, wavelength_mm: float) -> list[Array]:
        """Displace each coordinate by a smooth wave along the other two, so that no organ is an exact ellipsoid."""
        bent = []
        for axis in range(3):
            wave = np.float32(0)
            for _ in range(2):
                direction = self.rng.normal(size=3)
                direction *= 2 * np.pi / (wavelength_mm * self.rng.uniform(0.7, 1.4) * np.linalg.norm(direction))
                phase = np.float32(self.rng.uniform(0, 2 * np.pi))
                wave = wave + np.sin(sum(np.float32(k) * a for k, a in zip(direction, axes, strict=True)) + phase)
            bent.append(axes[axis] + np.float32(amplitude_mm / 2) * wave)
        return bent

    def _texture(self, size_mm: float) -> Array:
        """Field of unit variance with blobs of about `size_mm`, waves bent by slower waves."""
        field = np.float32(0)
        for axis in (self.z, self.y, self.x):
            k = self.rng.normal(size=3).astype(np.float32) / 15
            field = field + np.sin(axis / size_mm + 3 * np.sin(k[0] * self.z + k[1] * self.y + k[2] * self.x))
        scaled: Array = (field / field.std()).astype(np.float32)
        return scaled
