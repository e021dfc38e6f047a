"""One student through stock nnUNetv2_predict and through `fastnnunet predict` with every backend: the same voxels?

    python -m pipelines.measure.predict.stock_agreement -d 4 -p nnUNetPlans_r4_a0.5_T1 -m BUNDLE -i imagesTs -o R.json

Stock nnU-Net runs in a process in which fastnnunet cannot be imported. The share of equal voxels counts all voxels of
all cases.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.engines.registry import installed_cpu_engines
from fastnnunet.runtime.predict import Predictor
from pipelines.measure.head import arguments, header, put

STOCK = (
    "import sys; sys.modules['fastnnunet'] = None\n"
    "from nnunetv2.inference.predict_from_raw_data import predict_entry_point\n"
    "if __name__ == '__main__': predict_entry_point()\n"
)


def run_stock(dataset: str, configuration: str, plans: str, fold: str, images: Path, out: Path) -> None:
    """`nnUNetv2_predict` on the CPU with its defaults, without fastnnunet."""
    script = out.parent / "stock_predict.py"
    script.write_text(STOCK)
    options = ["-d", dataset, "-c", configuration, "-p", plans, "-f", fold, "-device", "cpu", "-npp", "1", "-nps", "1"]
    command = [sys.executable, str(script), "-i", str(images), "-o", str(out), *options]
    subprocess.run(command, check=True, capture_output=True, text=True)


def equal_voxels(left: Path, right: Path, file_ending: str) -> dict[str, Any]:
    """Voxels that have the same label in both folders, over all cases of `left`."""
    import SimpleITK as sitk

    equal = total = 0
    names = sorted(p.name for p in left.glob(f"*{file_ending}"))
    for name in names:
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name))) for folder in (left, right))
        equal, total = equal + int(np.count_nonzero(a == b)), total + a.size
    return {"cases": len(names), "voxels": total, "different": total - equal, "agreement": equal / total}


def measure(
    dataset: str,
    configuration: str,
    plans: str,
    fold: str,
    bundle: Path,
    images: Path,
    backends: list[str] | None = None,
) -> dict[str, Any]:
    """The record: agreement of every backend with stock nnU-Net."""
    record: dict[str, Any] = {
        **header("share of voxels with the same label: stock nnUNetv2_predict against fastnnunet predict, fp32"),
        "student": {"dataset": dataset, "configuration": configuration, "plans": plans, "fold": fold},
        "agreement": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        stock = Path(folder) / "stock"
        run_stock(dataset, configuration, plans, fold, images, stock)
        for backend in backends or installed_cpu_engines():
            predictor = Predictor.load(bundle, backend)
            out = Path(folder) / backend
            predictor.predict_files(images, out)
            record["agreement"][backend] = equal_voxels(stock, out, predictor.spec.file_ending)
    return record


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("-d", required=True)
    parser.add_argument("-c", default="3d_fullres")
    parser.add_argument("-p", required=True)
    parser.add_argument("-f", default="0")
    parser.add_argument("-m", type=Path, required=True)
    parser.add_argument("-i", type=Path, required=True)
    args = parser.parse_args()
    result = measure(args.d, args.c, args.p, args.f, args.m, args.i)
    put(result, args.o)
    for name, row in result["agreement"].items():
        print(f"{name}: {row['agreement']:.6%} of {row['voxels']} voxels, {row['different']} different")
