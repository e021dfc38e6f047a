"""Meshes: closed, of the volume of the voxels, where they lie in the patient; read by hand and by trimesh."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.measure import euler_number, marching_cubes

from fastnnunet.images.finished import is_segmentation
from fastnnunet.images.io import image_io
from fastnnunet.outputs.colours import colour_of, rgb_of
from fastnnunet.outputs.labelled import LabelledImage, structures_of
from fastnnunet.outputs.mesh.files import gltf, stl_files, write_mesh
from fastnnunet.outputs.mesh.surface import Surface, surface_of

LABELS = {"background": 0, "ball": 1, "lump/left": 2, "never there": 3}
AFFINES = {
    "straight": np.diag((0.7, 1.1, 2.5, 1.0)),
    "mirrored": np.diag((-0.7, 1.1, 2.5, 1.0)),
    "oblique": np.array([[0.6, -0.8, 0, 5], [0.8, 0.6, 0, -7], [0, 0, -3, 11], [0, 0, 0, 1.0]]),
}


def _labelled(labels_ZYX: np.ndarray, affine: np.ndarray | None = None, labels: Any = LABELS) -> LabelledImage:
    affine = AFFINES["straight"] if affine is None else affine
    return LabelledImage(case="a", labels_ZYX=labels_ZYX, affine=affine, structures=structures_of(labels))


def _surface(labelled: LabelledImage, *, smooth: bool = True) -> Surface:
    found = surface_of(labelled, labelled.structures[0], smooth=smooth)
    assert found is not None
    return found


def _ball(radius: float = 9.0) -> np.ndarray:
    z, y, x = np.indices((22, 24, 26)) - np.reshape((11, 12, 13), (3, 1, 1, 1))
    return (z**2 + y**2 + x**2 < radius**2).astype(np.uint8)


def _is_closed(surface: Surface) -> bool:
    """Every way along an edge is gone as often in the other direction."""
    edges = np.concatenate([surface.triangles[:, [i, (i + 1) % 3]] for i in range(3)])
    ways, counts = np.unique(edges, axis=0, return_counts=True)
    found = {tuple(way): int(count) for way, count in zip(ways.tolist(), counts, strict=True)}
    return all(found.get((b, a)) == count for (a, b), count in found.items())


@settings(max_examples=25, deadline=None)
@given(
    arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3), elements=st.integers(0, 1)), st.sampled_from(list(AFFINES))
)
def test_faces_of_voxels_have_their_volume_and_are_closed(labels: np.ndarray, affine: str) -> None:
    labelled = _labelled(labels, AFFINES[affine])
    if not labels.any():
        assert surface_of(labelled, labelled.structures[0]) is None
        return
    volume = labels.sum() * 1000 * (labelled.voxel_ml or 0)
    plain = _surface(labelled, smooth=False)
    assert plain.volume_mm3 == pytest.approx(volume)
    assert _is_closed(plain)
    smoothed = _surface(labelled)
    assert smoothed.volume_mm3 == pytest.approx(volume, rel=0.05)
    np.testing.assert_array_equal(smoothed.triangles, plain.triangles)


@pytest.mark.parametrize("affine", AFFINES)
def test_a_ball_is_smooth_and_where_marching_cubes_have_it(affine: str) -> None:
    labelled = _labelled(_ball(), AFFINES[affine])
    ours = _surface(labelled)
    mesh = trimesh.Trimesh(ours.vertices_mm, ours.triangles, process=False)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(ours.volume_mm3)
    assert mesh.volume == pytest.approx(_ball().sum() * 1000 * (labelled.voxel_ml or 0), rel=0.01)
    assert mesh.euler_number == 2
    assert (ours.vertex_normals() * mesh.vertex_normals).sum(axis=1).min() > 0.95  # trimesh weighs by angles
    theirs = marching_cubes(np.pad(_ball(), 1).astype(float), 0.5)[0] - 1
    from scipy.spatial import cKDTree

    distances, _ = cKDTree(labelled.points_mm(theirs)).query(ours.vertices_mm)
    assert distances.max() < np.linalg.norm(labelled.affine[:3, :3], axis=0).max()
    plain = _surface(labelled, smooth=False)
    # no vertex left the cube between the centres of the voxels around it
    moved = np.linalg.solve(labelled.affine[:3, :3], (ours.vertices_mm - plain.vertices_mm).T)
    assert 0.1 < np.abs(moved).max() <= 0.5 + 1e-9
    assert mesh.area < trimesh.Trimesh(plain.vertices_mm, plain.triangles, process=False).area * 0.85


def test_a_ring_has_its_hole() -> None:
    labels = np.ones((3, 9, 9), np.uint8)
    labels[:, 3:6, 3:6] = 0
    ours = _surface(_labelled(labels))
    assert trimesh.Trimesh(ours.vertices_mm, ours.triangles, process=False).euler_number == 0
    assert euler_number(labels, connectivity=1) == 0


def test_one_voxel_at_the_border() -> None:
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[2, 0, 4] = 1
    ours = _surface(_labelled(labels))
    np.testing.assert_allclose(ours.vertices_mm.min(axis=0), (3.5 * 0.7, -0.5 * 1.1, 1.5 * 2.5))
    np.testing.assert_allclose(ours.vertices_mm.max(axis=0), (4.5 * 0.7, 0.5 * 1.1, 2.5 * 2.5))


def _two() -> np.ndarray:
    labels = _ball(6)
    labels[1:5, 1:6, 1:7] = 2
    return labels


def test_stl_is_in_the_patient(tmp_path: Path) -> None:
    labelled = _labelled(_two(), AFFINES["oblique"])
    (tmp_path / "a_stl").mkdir()
    (tmp_path / "a_stl" / "never_there.stl").write_text("of an earlier run")
    write_mesh(labelled, tmp_path / "a.glb")
    assert sorted(p.name for p in (tmp_path / "a_stl").iterdir()) == ["ball.stl", "lump_left.stl"]
    content = (tmp_path / "a_stl" / "ball.stl").read_bytes()
    assert content.startswith(b"SPACE=LPS UNIT=mm")
    (count,) = struct.unpack_from("<I", content, 80)
    assert len(content) == 84 + 50 * count
    expected = _surface(labelled)
    corners = np.frombuffer(content[84:], np.dtype([("n", "<f4", 3), ("c", "<f4", (3, 3)), ("_", "<u2")]))
    np.testing.assert_allclose(corners["c"], expected.vertices_mm[expected.triangles], rtol=1e-5, atol=1e-4)
    read = trimesh.load(io.BytesIO(content), file_type="stl")
    assert read.volume == pytest.approx(expected.volume_mm3, rel=1e-4)
    np.testing.assert_allclose(corners["n"], read.face_normals, atol=1e-3)


def test_gltf_is_in_metres_with_the_head_up(tmp_path: Path) -> None:
    labelled = _labelled(_two(), AFFINES["mirrored"])
    write_mesh(labelled, tmp_path / "a.glb")
    content = (tmp_path / "a.glb").read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", content)
    assert (magic, version, length, kind) == (b"glTF", 2, len(content), b"JSON")
    scene = json.loads(content[20 : 20 + size])
    assert [node["name"] for node in scene["nodes"]] == ["ball", "lump/left"]
    assert all(view["byteOffset"] % 4 == 0 for view in scene["bufferViews"])
    scene_of_trimesh = trimesh.load(tmp_path / "a.glb")
    for number, structure in enumerate(labelled.structures[:2]):
        surface = surface_of(labelled, structure)
        assert surface is not None
        mesh = list(scene_of_trimesh.geometry.values())[number]
        left, back, head = surface.vertices_mm.T / 1000
        np.testing.assert_allclose(mesh.bounds[0], (left.min(), head.min(), (-back).min()), atol=1e-6)
        np.testing.assert_allclose(mesh.bounds[1], (left.max(), head.max(), (-back).max()), atol=1e-6)
        assert mesh.volume * 1e9 == pytest.approx(surface.volume_mm3, rel=1e-3)  # positive: not turned inside out
        red, green, blue, _ = scene["materials"][number]["pbrMetallicRoughness"]["baseColorFactor"]
        seen = [255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055) for v in (red, green, blue)]
        np.testing.assert_allclose(seen, rgb_of(colour_of(structure.number)), atol=0.5)
    assert is_segmentation(image_io("SimpleITKIO"), tmp_path / "a.glb")
    (tmp_path / "cut.glb").write_bytes(content[:-1])
    assert not is_segmentation(image_io("SimpleITKIO"), tmp_path / "cut.glb")


def test_nothing_is_a_scene_too() -> None:
    content = gltf({})
    (size,) = struct.unpack_from("<I", content, 12)
    scene = json.loads(content[20:])
    assert len(content) == 20 + size
    assert scene["asset"]["version"] == "2.0"
    assert not {"nodes", "meshes", "buffers", "scenes"} & set(scene)


def test_names_of_files_are_apart() -> None:
    labels = {"b": 0, "Liver": 1, "liver": 2, "../x": 3, "": 4, "肝": 5, "x" * 300: 6}
    files = [p.name for p in stl_files(structures_of(labels), Path("out/a.glb")).values()]
    assert files[:5] == ["1_Liver.stl", "2_liver.stl", "x.stl", "4_.stl", "肝.stl"]
    assert len(files[5]) < 200
