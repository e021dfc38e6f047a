from collections.abc import Callable, Sequence
from typing import Annotated, overload

import numpy
from numpy.typing import NDArray

INTERFACE: int = 8

def kl_classes(
    logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    soft: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    temperature: float,
    mask: Annotated[NDArray[numpy.bool_], dict(shape=(None, None), order="C", device="cpu", writable=False)] | None,
    difference: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")],
    threads: int,
) -> tuple[float, int]: ...
def sample(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    labels: Annotated[NDArray[numpy.int16], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    grid: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    outside: int,
    values_out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
    labels_out: Annotated[NDArray[numpy.int16], dict(shape=(None, None), order="C", device="cpu")],
    threads: int,
) -> None: ...
def sample_inside(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    space: Sequence[int],
    lower: Sequence[int],
    grid: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    nothing: float,
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
    threads: int,
) -> None: ...
@overload
def resample(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")],
    orders: Sequence[int],
    torch: bool,
    clip: str,
    threads: int,
) -> None: ...
@overload
def resample(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float64], dict(shape=(None, None, None, None), device="cpu")],
    orders: Sequence[int],
    torch: bool,
    clip: str,
    threads: int,
) -> None: ...
@overload
def resample(
    values: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")],
    orders: Sequence[int],
    torch: bool,
    clip: str,
    threads: int,
) -> None: ...

class Cut:
    @property
    def length(self) -> int: ...
    @property
    def tile(self) -> int: ...
    @property
    def starts(self) -> tuple[int, ...]: ...
    @property
    def kept(self) -> tuple[int, ...]: ...
    @property
    def before(self) -> tuple[int, ...]: ...
    @property
    def computed(self) -> int: ...

class TileAxis:
    def __init__(
        self, *, size: int, least: int, multiple: int, halo: int, shifts: int = 1, most: int | None = None
    ) -> None: ...
    @property
    def halo(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def frame(self) -> int: ...
    @property
    def before(self) -> tuple[int, ...]: ...
    def crop(self, begin: int, end: int) -> tuple[int, int]: ...
    def cuts(self) -> list[Cut]: ...

class Tiling:
    @property
    def cuts(self) -> tuple[Cut, Cut, Cut]: ...
    @property
    def tile(self) -> tuple[int, int, int]: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def shifts(self) -> int: ...
    def kept(self, number: Sequence[int]) -> tuple[slice, slice, slice]: ...
    def origin(self, number: Sequence[int], shift: int) -> tuple[int, int, int]: ...

def fewest_tiles(axes: Sequence[TileAxis], cost: Callable[[Sequence[int]], int], limit: int) -> Tiling | None: ...
def tells_no_memory(message: str) -> bool: ...
def smaller_limit(axes: Sequence[TileAxis], cost: Callable[[Sequence[int]], int], limit: int) -> int | None: ...
def least_cost(axes: Sequence[TileAxis], cost: Callable[[Sequence[int]], int]) -> int | None: ...

class AxisOperator:
    def __init__(self, size_in: int, size_out: int, order: int, torch: bool) -> None: ...
    @property
    def taps(self) -> int: ...
    @property
    def is_identity(self) -> bool: ...
    @property
    def is_selection(self) -> bool: ...
    @property
    def poles(self) -> list[float]: ...
    @property
    def first(self) -> list[int]: ...
    @property
    def weights(self) -> list[float]: ...
    @property
    def sample(self) -> list[int]: ...

class ResamplePlan:
    @property
    def orders(self) -> tuple[int, int, int]: ...
    @property
    def shape_out(self) -> tuple[int, int, int]: ...
    @property
    def separate_axis(self) -> int | None: ...
    @property
    def clip(self) -> str: ...
    @property
    def is_local(self) -> bool: ...
    @property
    def is_torch(self) -> bool: ...
    @property
    def keeps_dtype(self) -> bool: ...

def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]
) -> tuple[int, int, int]: ...
def plan_resampling(
    torch: bool,
    order: int,
    order_z: int,
    force_separate_z: bool | None,
    anisotropy_threshold: float,
    shape: Sequence[int],
    shape_out: Sequence[int],
    spacing: Sequence[float],
    spacing_out: Sequence[float],
) -> ResamplePlan | None: ...
def centre_padding(size: int, least: int) -> tuple[int, int]: ...
def tile_starts(image: Sequence[int], tile: Sequence[int], step_size: float) -> list[list[int]]: ...
def gaussian_weights(out: Annotated[NDArray[numpy.float32], dict(order="C", device="cpu")]) -> None: ...

class ChunkedWindow:
    @staticmethod
    def of_chunks(
        shape: Sequence[int], patch: Sequence[int], step_size: float, chunk: Sequence[int]
    ) -> ChunkedWindow: ...
    @staticmethod
    def streamed(shape: Sequence[int], patch: Sequence[int], step_size: float) -> ChunkedWindow: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def tile(self) -> tuple[int, int, int]: ...
    @property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]: ...
    @property
    def bounds(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def tiles(self) -> tuple[tuple[int, int, int], ...]: ...
    def chunk_slices(self, number: Sequence[int]) -> tuple[slice, slice, slice]: ...
    def overlap(
        self, tile_number: int, number: Sequence[int]
    ) -> tuple[tuple[slice, slice, slice], tuple[slice, slice, slice]]: ...
    def chunks_of(self, tile_number: int) -> list[tuple[int, int, int]]: ...
    @property
    def tiles_per_chunk(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None, None, None))]: ...
    def peak_voxels(self, margin: int = 0) -> int: ...

def block_means(
    image: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    factor: Sequence[int],
    means: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")],
    threads: int,
) -> None: ...
def seen_box(
    logits: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    threshold: float,
    factor: Sequence[int],
    shape: Sequence[int],
) -> tuple[list[int], list[int]] | None: ...
def with_margin(
    box: tuple[Sequence[int], Sequence[int]], margin_mm: float, spacing_mm: Sequence[float], shape: Sequence[int]
) -> tuple[list[int], list[int]]: ...
def window_part(shape: Sequence[int], patch: Sequence[int], box: tuple[Sequence[int], Sequence[int]]) -> ImagePart: ...

class ImagePart:
    def __init__(self, origin: Sequence[int], size: Sequence[int]) -> None: ...
    @property
    def origin(self) -> tuple[int, int, int]: ...
    @property
    def size(self) -> tuple[int, int, int]: ...
    @property
    def voxels(self) -> int: ...
    def bounds(self, of_part: Sequence[Sequence[int]], shape: Sequence[int]) -> list[list[int]]: ...
    def shared(
        self, of_part: tuple[Sequence[int], Sequence[int]], shape: Sequence[int]
    ) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]] | None: ...

@overload
def resample_planned(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")],
    plan: ResamplePlan,
    threads: int,
) -> None: ...
@overload
def resample_planned(
    values: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")],
    plan: ResamplePlan,
    threads: int,
) -> None: ...
@overload
def label_logits(
    logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    labels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), device="cpu")],
    size_in: Sequence[int],
    size_out: Sequence[int],
    first_in: Sequence[int],
    first_out: Sequence[int],
    orders: Sequence[int],
    torch: bool,
    to_half: bool,
    regions: Sequence[int] | None,
    threads: int,
) -> None: ...
@overload
def label_logits(
    logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    labels: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), device="cpu")],
    size_in: Sequence[int],
    size_out: Sequence[int],
    first_in: Sequence[int],
    first_out: Sequence[int],
    orders: Sequence[int],
    torch: bool,
    to_half: bool,
    regions: Sequence[int] | None,
    threads: int,
) -> None: ...
@overload
def label_logits(
    logits: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    labels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), device="cpu")],
    size_in: Sequence[int],
    size_out: Sequence[int],
    first_in: Sequence[int],
    first_out: Sequence[int],
    orders: Sequence[int],
    torch: bool,
    to_half: bool,
    regions: Sequence[int] | None,
    threads: int,
) -> None: ...
@overload
def label_logits(
    logits: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    labels: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), device="cpu")],
    size_in: Sequence[int],
    size_out: Sequence[int],
    first_in: Sequence[int],
    first_out: Sequence[int],
    orders: Sequence[int],
    torch: bool,
    to_half: bool,
    regions: Sequence[int] | None,
    threads: int,
) -> None: ...
@overload
def resample_planes(
    logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")],
    depth_out: int,
    first_plane: int,
    orders: Sequence[int],
    torch: bool,
    to_half: bool,
    threads: int,
) -> None: ...
@overload
def resample_planes(
    logits: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")],
    depth_out: int,
    first_plane: int,
    orders: Sequence[int],
    torch: bool,
    to_half: bool,
    threads: int,
) -> None: ...
def last_inputs(size_in: int, size_out: int, order: int, torch: bool) -> list[int]: ...
@overload
def label_head(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    to_half: bool,
    head: int,
    best: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")],
    labels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), device="cpu")],
    threads: int,
) -> None: ...
@overload
def label_head(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    to_half: bool,
    head: int,
    best: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")],
    labels: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), device="cpu")],
    threads: int,
) -> None: ...
@overload
def paint_head(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    to_half: bool,
    label: int,
    labels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), device="cpu")],
    threads: int,
) -> None: ...
@overload
def paint_head(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    to_half: bool,
    label: int,
    labels: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), device="cpu")],
    threads: int,
) -> None: ...
def softmax_heads(
    logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")], threads: int
) -> None: ...
def sigmoid_heads(
    logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu")], threads: int
) -> None: ...
def add_weighted(
    logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    weights: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    sums: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu")],
    is_first: bool,
    threads: int,
) -> None: ...
def add_halves(
    values: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    sums: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu")],
    threads: int,
) -> None: ...
def divide(
    sums: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None, None), device="cpu")],
    total: Annotated[NDArray[numpy.float16], dict(shape=(None, None, None), device="cpu", writable=False)],
    threads: int,
) -> tuple[tuple[float, float], tuple[float, float]]: ...
def round_to_half(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")],
    threads: int,
) -> None: ...
def moments(
    channel: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")],
    mask: Annotated[NDArray[numpy.bool_], dict(shape=(None, None, None), device="cpu", writable=False)] | None,
    threads: int,
) -> tuple[float, float]: ...
def z_score(
    channel: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")],
    mask: Annotated[NDArray[numpy.bool_], dict(shape=(None, None, None), device="cpu", writable=False)] | None,
    threads: int,
) -> None: ...
def clip_and_scale(
    channel: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")],
    low: float,
    high: float,
    mean: float,
    std: float,
    threads: int,
) -> None: ...
def rescale_to_01(
    channel: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")], threads: int
) -> None: ...
def rgb_to_01(
    channel: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu")], threads: int
) -> tuple[float, float]: ...
def limits(
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), device="cpu", writable=False)],
    threads: int,
) -> tuple[float, float]: ...
def fits_half(lowest: float, highest: float) -> bool: ...
def nonzero_box(
    channels: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    threads: int,
) -> tuple[list[int], list[int]]: ...
def nonzero_mask(
    channels: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), device="cpu", writable=False)],
    mask: Annotated[NDArray[numpy.bool_], dict(shape=(None, None, None), device="cpu")],
    threads: int,
) -> None: ...
def label_components(
    mask: Annotated[NDArray[numpy.bool_], dict(shape=(None, None, None), device="cpu", writable=False)],
    connectivity: int,
    labels: Annotated[NDArray[numpy.int32], dict(shape=(None, None, None), device="cpu")],
    threads: int,
) -> list[int]: ...
def fill_holes(
    mask: Annotated[NDArray[numpy.bool_], dict(shape=(None, None, None), device="cpu")], threads: int
) -> None: ...
def resample_labels(
    labels: Annotated[NDArray[numpy.int32], dict(shape=(None, None, None), device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.int32], dict(shape=(None, None, None), device="cpu")],
    plan: ResamplePlan,
    threads: int,
) -> None: ...
@overload
def keep_largest(
    labels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), device="cpu")],
    wanted: Sequence[int],
    background: int,
    threads: int,
) -> None: ...
@overload
def keep_largest(
    labels: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), device="cpu")],
    wanted: Sequence[int],
    background: int,
    threads: int,
) -> None: ...
@overload
def remove_small(
    labels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), device="cpu")], min_voxels: int, threads: int
) -> None: ...
@overload
def remove_small(
    labels: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), device="cpu")],
    min_voxels: int,
    threads: int,
) -> None: ...
@overload
def fill_label_holes(
    labels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), device="cpu")],
    wanted: Sequence[int],
    threads: int,
) -> None: ...
@overload
def fill_label_holes(
    labels: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None), device="cpu")],
    wanted: Sequence[int],
    threads: int,
) -> None: ...
