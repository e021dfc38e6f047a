"""Patches an exported model is compared with PyTorch on, real or noise, and random ones to calibrate on."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from fastnnunet.errors import MismatchError, NotFoundError
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.geometry.plain import is_plain
from fastnnunet.nnunet.files.cases import PreprocessedCases, open_cases

PARITY_PATCHES = 2
_NOISE_SCALES = (1.0, 4.0)  # voxels: texture and shapes
_MIDDLE = float(np.nextafter(0.5, 0))  # of an even number of places the lower one


class Patches(Protocol):
    """Patches to calibrate on: an array (N, C, *patch), or what hands out slices of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: slice, /) -> np.ndarray: ...


def real_patches(
    plans: dict[str, Any], configuration: str, patch_size: tuple[int, ...], previous_labels: tuple[int, ...] = ()
) -> np.ndarray:
    """Centre patches of the first preprocessed cases that show something, zero padded: float32 (N, C, *patch).

    In a cascade the label of the case stands in for the previous stage's segmentation.
    Raises NotFoundError when there are no preprocessed cases.
    """
    cases = open_cases(plans, configuration)
    showing: list[np.ndarray] = []
    plain: list[np.ndarray] = []
    for case_id in cases.case_ids:
        patch_CX = _cut(network_input(cases, case_id, previous_labels), patch_size, (_MIDDLE,) * 3)
        (plain if is_plain(patch_CX) else showing).append(patch_CX)
        if len(showing) == PARITY_PATCHES:
            break
    return np.stack((showing + plain)[:PARITY_PATCHES])


def real_images(
    plans: dict[str, Any], configuration: str, previous_labels: tuple[int, ...] = (), count: int = 2
) -> Iterator[np.ndarray]:
    """What the network sees of the first preprocessed cases that show something, float32 (C, Z, Y, X)."""
    try:
        cases = open_cases(plans, configuration)
    except (NotFoundError, MismatchError):
        return
    images = (network_input(cases, case_id, previous_labels) for case_id in cases.case_ids)
    yield from islice((image for image in images if not is_plain(image)), count)


def network_input(cases: PreprocessedCases, case_id: str, previous_labels: tuple[int, ...] = ()) -> np.ndarray:
    """What the network sees of a preprocessed case: float32 (C, Z, Y, X); in a cascade with its label as one-hot."""
    image_CZYX = cases.image_CZYX(case_id)
    if not previous_labels:
        return image_CZYX
    label_ZYX = cases.label_ZYX(case_id)
    one_hot = np.stack([label_ZYX == label for label in previous_labels])
    return np.concatenate([image_CZYX, one_hot.astype(np.float32)])


class RandomPatches:
    """Patches at random places of random cases, read when they are asked for, by slices as from an array.

    Every window that lies within an image is equally likely; smaller images are padded with zeros, as in prediction.
    They come case by case, and one image is in memory.
    """

    def __init__(
        self,
        case_ids: Sequence[str],
        load: Callable[[str], np.ndarray],
        patch_size: tuple[int, ...],
        count: int,
        seed: int,
    ) -> None:
        """`load`: the image (C, Z, Y, X) of a case."""
        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(case_ids), size=count)
        places = rng.random((count, 3))
        self._drawn = [
            (case_ids[case], tuple(place)) for case, place in sorted(zip(drawn, places.tolist(), strict=True))
        ]
        self._load, self._patch_size = load, patch_size
        self._case_id: str | None = None
        self._image_CZYX = np.empty(0)

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, numbers: slice) -> np.ndarray:
        """Float32 (N, C, *patch)."""
        return np.stack([self._patch(case_id, place) for case_id, place in self._drawn[numbers]])

    def _patch(self, case_id: str, place: tuple[float, ...]) -> np.ndarray:
        if case_id != self._case_id:
            self._image_CZYX, self._case_id = self._load(case_id), case_id
        return _cut(self._image_CZYX, self._patch_size, place)


class CalibrationBatches:
    """Patches in batches of what a model takes at once; those beyond the last full batch are left out."""

    def __init__(self, patches_NCX: Patches, batch_size: int, progress: Listener = ignore) -> None:
        """`progress` hears of each batch before it is read."""
        self._patches_NCX, self._size, self._progress = patches_NCX, batch_size, progress

    def __len__(self) -> int:
        return len(self._patches_NCX) // self._size

    def __iter__(self) -> Iterator[np.ndarray]:
        for stop in range(self._size, len(self._patches_NCX) + 1, self._size):
            self._progress(Progress(what="calibrating", done=stop, total=len(self._patches_NCX), unit="patches"))
            yield self._patches_NCX[stop - self._size : stop]


def noise_patches(num_channels: int, patch_size: tuple[int, ...], num_previous: int = 0) -> np.ndarray:
    """Noise with structure at several scales, as normalised images have it: float32 (N, C, *patch), always the same.

    `num_previous`: of a cascade, the one-hot channels among `num_channels`; each is a random region.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    patches = np.zeros((PARITY_PATCHES, num_channels, *patch_size), np.float32)
    for patch in patches:
        for channel in patch:
            for scale in _NOISE_SCALES:
                layer = gaussian_filter(rng.standard_normal(patch_size), scale)
                channel += layer / layer.std()
        if num_previous:
            previous = patch[-num_previous:]
            previous[...] = (previous == previous.max(axis=0)) & (previous > 0)  # no voxel has two labels
    return patches


def _cut(image_CZYX: np.ndarray, patch_size: tuple[int, ...], place: tuple[float, ...]) -> np.ndarray:
    """A window of an image, float32 (C, *patch): along each axis at `place` in [0, 1) of the places there are.

    Along an axis on which the image is smaller it lies in the window's centre, with zeros around it.
    """
    size = patch_size if len(patch_size) == 3 else (1, *patch_size)
    source, target = [], []
    for length, window, at in zip(image_CZYX.shape[1:], size, place, strict=True):
        common = min(length, window)
        start, offset = int(at * (length - common + 1)), (window - common) // 2
        source.append(slice(start, start + common))
        target.append(slice(offset, offset + common))
    patch = np.zeros((image_CZYX.shape[0], *size), np.float32)
    patch[(slice(None), *target)] = image_CZYX[(slice(None), *source)]
    return patch.reshape(image_CZYX.shape[0], *patch_size)
