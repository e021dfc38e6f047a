"""The notebook is run from its first cell to its last, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import SimpleITK as sitk

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "first_student.ipynb"
FEW_VOXELS = "import pytest, tests.tiny; tests.tiny.draw_few_voxels(pytest.MonkeyPatch())"  # and few iterations


def test_the_notebook_runs(tmp_path):
    notebook = json.loads(NOTEBOOK.read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "committed without outputs"
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "notebook.py"
    cells.insert(1, FEW_VOXELS)
    text = "\n\n".join(cells)
    assert text.count("iterations_per_epoch=25") == 2
    body = text.replace("iterations_per_epoch=25", "iterations_per_epoch=2").replace("\n", "\n    ")
    script.write_text(f"if __name__ == '__main__':\n    {body}\n")  # nnU-Net spawns processes, which a notebook may
    environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
    environment |= {"FASTNNUNET_NOTEBOOK": str(tmp_path / "out"), "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = str(NOTEBOOK.parents[2])
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5 cases" in done.stdout
    assert "1 case predicted" in done.stdout
    (predicted,) = (tmp_path / "out" / "predicted").glob("*.nii.gz")
    image = tmp_path / "out" / "raw" / "Dataset902_Notebook" / "imagesTs" / predicted.name.replace(".nii", "_0000.nii")
    assert sitk.ReadImage(str(predicted)).GetSize() == sitk.ReadImage(str(image)).GetSize()
    assert (tmp_path / "out" / "slice.png").read_bytes().startswith(b"\x89PNG")
