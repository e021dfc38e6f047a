"""nnU-Net's own planning and preprocessing as one call."""

import contextlib
import json
from pathlib import Path

from fastnnunet.errors import BuildError
from fastnnunet.nnunet.paths import nnunet_folder, resolve_dataset
from fastnnunet.system.children import others_children


def plan_and_preprocess(dataset: str, configuration: str, num_processes: int, log_file: Path | None = None) -> Path:
    """Fingerprint, plan and preprocess a raw data set; returns its folder in nnUNet_preprocessed.

    nnU-Net's messages go to `log_file` (None: they are dropped). Raises NotFoundError for unset folders or an unknown
    data set, BuildError when nnU-Net left no preprocessed case behind.
    """
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        nnunet_folder(name)
    dataset_name = resolve_dataset(dataset)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    dataset_id = int(dataset_name[len("Dataset") :].split("_")[0])
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(log_file or "/dev/null", "a"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(others_children())
        extract_fingerprints([dataset_id], num_processes=num_processes, check_dataset_integrity=True)
        plans_name = plan_experiments([dataset_id])
        preprocess([dataset_id], plans_name, configurations=[configuration], num_processes=[num_processes])
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name
    plans = json.loads((folder / f"{plans_name}.json").read_text())
    if configuration not in plans["configurations"]:
        raise BuildError(
            f"nnU-Net planned no {configuration!r} for {dataset_name}; it planned: {', '.join(plans['configurations'])}"
        )
    data = folder / plans["configurations"][configuration]["data_identifier"]
    if not data.is_dir() or not any(data.iterdir()):
        raise BuildError(f"nnU-Net preprocessed no case into {data}; see {log_file or 'its own output'}")
    return folder
