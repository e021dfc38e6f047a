"""Tiles for a network whose output at a voxel depends on a halo around it alone: each voxel is kept from one of them.

The decisions are the core's, `native/core/tiles.hpp`.
"""

from collections.abc import Callable, Sequence

from fastnnunet import native

Cost = Callable[[Sequence[int]], int]  # of a tile, by its lengths; grows with each
Axis = native.TileAxis  # what tiles along an axis need
Cut = native.Cut  # the tiles along one axis
Tiling = native.Tiling  # cuts along z, y and x


def fewest_tiles(axes: Sequence[Axis], cost: Cost, limit: int) -> Tiling | None:
    """The tiling that computes the fewest voxels among those whose tile (its lengths) costs no more than `limit`.

    Of several the one of the fewest tiles; None where even the smallest tile costs more.
    """
    return native.fewest_tiles(axes, cost, limit)


def smaller_limit(axes: Sequence[Axis], cost: Cost, limit: int) -> int | None:
    """The limit to try next where a network found no memory for the tiles that `limit` lets it have.

    Half of what such a tile costs, or what the smallest costs; None where it was the smallest.
    """
    return native.smaller_limit(axes, cost, limit)


def least_cost(axes: Sequence[Axis], cost: Cost) -> int | None:
    """What the smallest tile costs; None where the longest tiles that are allowed are too short."""
    return native.least_cost(axes, cost)
