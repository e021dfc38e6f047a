"""Surfaces as files: a glTF scene (.glb) of all structures, and an STL of each.

STL has millimetres to the left, back and head of the patient (LPS), and says so in its header, which 3D Slicer reads.
glTF has metres and its y axis up, as its specification wants it: x to the left, y to the head, z to the front.
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnnunet.images.output import sibling
from fastnnunet.outputs.colours import linear_of
from fastnnunet.outputs.labelled import LabelledImage, Structure
from fastnnunet.outputs.mesh.surface import Surface, surface_of
from fastnnunet.system.files import atomic_output, make_folder
from fastnnunet.version import __version__

ENDING, STL_FOLDER = ".glb", "_stl"
_TO_GLTF = np.array(((1, 0, 0), (0, 0, 1), (0, -1, 0))) / 1000  # mm, LPS -> m: left, head, front
_STL_HEADER = f"SPACE=LPS UNIT=mm FastnnUNet {__version__}"
_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_FLOAT, _UINT32, _VERTICES, _INDICES = 5126, 5125, 34962, 34963  # glTF 2.0, 5.1.3 and 5.11.3
_LONGEST_NAME = 120  # bytes


def write_mesh(labelled: LabelledImage, file: Path) -> None:
    """Write `file` (.glb) and, in the folder `CASE_stl` beside it, an STL of every structure that has a voxel.

    Of structures without one, STL files of an earlier run are removed. Raises FastnnUNetError where a file cannot be
    written.
    """
    surfaces = {s: surface for s in labelled.structures if (surface := surface_of(labelled, s)) is not None}
    for structure, place in stl_files(labelled.structures, file).items():
        if structure in surfaces:
            make_folder(place.parent)
            with atomic_output(place) as partial:
                partial.write_bytes(stl(surfaces[structure]))
        else:
            place.unlink(missing_ok=True)
    with atomic_output(file) as partial:
        partial.write_bytes(gltf(surfaces))


def stl_folder(file: Path) -> Path:
    """Where the STL files go, beside the .glb `file`; it is there where a structure has a voxel."""
    return sibling(file, ENDING, STL_FOLDER)


def stl_files(structures: Sequence[Structure], file: Path) -> Mapping[Structure, Path]:
    """Where the STL of each structure goes, beside the .glb `file`: called by its name, or its number and name."""
    folder = stl_folder(file)
    names = {s: _file_name(s.name) for s in structures}
    common = [name.casefold() for name in names.values()]
    return {
        s: folder / f"{name if name and common.count(name.casefold()) == 1 else f'{s.number}_{name}'}.stl"
        for s, name in names.items()
    }


def stl(surface: Surface) -> bytes:
    """Binary STL."""
    triangles = np.zeros(len(surface.triangles), _TRIANGLE)
    triangles["normal"] = surface.normals()
    triangles["corners"] = surface.vertices_mm[surface.triangles]
    return _STL_HEADER.encode().ljust(80) + struct.pack("<I", len(triangles)) + triangles.tobytes()


def gltf(surfaces: Mapping[Structure, Surface]) -> bytes:
    """Binary glTF 2.0: a node, a mesh and a material for each structure, called by its name."""
    scene: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": f"FastnnUNet {__version__}"},
        "extras": {"coordinates": "metres; x to the left, y to the head, z to the front of the patient"},
    }
    binary = bytearray()
    parts: dict[str, list[Any]] = {name: [] for name in ("nodes", "meshes", "materials", "accessors", "bufferViews")}

    def accessor(values: npt.NDArray[Any], component: int, kind: str, target: int, **more: Any) -> int:
        parts["bufferViews"].append(
            {"buffer": 0, "byteOffset": len(binary), "byteLength": values.nbytes, "target": target}
        )
        binary.extend(values.tobytes())  # of four bytes each, so that everything stays aligned
        view = len(parts["bufferViews"]) - 1
        count = values.size if kind == "SCALAR" else len(values)
        parts["accessors"].append(
            {"bufferView": view, "componentType": component, "count": count, "type": kind, **more}
        )
        return view

    for number, (structure, surface) in enumerate(surfaces.items()):
        places = (surface.vertices_mm @ _TO_GLTF.T).astype("<f4")
        directions = (surface.vertex_normals() @ (1000 * _TO_GLTF).T).astype("<f4")
        limits = {"min": places.min(axis=0).tolist(), "max": places.max(axis=0).tolist()}
        position = accessor(places, _FLOAT, "VEC3", _VERTICES, **limits)
        normal = accessor(directions, _FLOAT, "VEC3", _VERTICES)
        indices = accessor(surface.triangles.astype("<u4").ravel(), _UINT32, "SCALAR", _INDICES)
        primitive = {"attributes": {"POSITION": position, "NORMAL": normal}, "indices": indices, "material": number}
        parts["meshes"].append({"name": structure.name, "primitives": [primitive]})
        parts["materials"].append({"name": structure.name, "pbrMetallicRoughness": _material(structure)})
        parts["nodes"].append({"name": structure.name, "mesh": number, "extras": {"values": list(structure.values)}})
    if surfaces:
        scene |= {"scene": 0, "scenes": [{"nodes": list(range(len(surfaces)))}], **parts}
        scene["buffers"] = [{"byteLength": len(binary)}]
    text = json.dumps(scene, separators=(",", ":")).encode()
    chunks = [(b"JSON", text.ljust(-(-len(text) // 4) * 4))]
    if surfaces:
        chunks.append((b"BIN\0", bytes(binary)))
    body = b"".join(struct.pack("<I4s", len(content), kind) + content for kind, content in chunks)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def _material(structure: Structure) -> dict[str, Any]:
    """Colours of glTF are linear."""
    return {"baseColorFactor": [*linear_of(structure.colour), 1.0], "metallicFactor": 0.0, "roughnessFactor": 0.8}


def _file_name(name: str) -> str:
    text = re.sub(r"[^\w.-]+", "_", name).strip("._")
    return text.encode()[:_LONGEST_NAME].decode(errors="ignore")
