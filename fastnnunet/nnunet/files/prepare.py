"""nnU-Net's own planning and preprocessing as one call."""

import contextlib
import os
from pathlib import Path

from fastnnunet.errors import BuildError, MismatchError, SpecError
from fastnnunet.nnunet.files.paths import dataset_number, nnunet_folder, resolve_dataset
from fastnnunet.nnunet.files.plans import configuration_of, read_json
from fastnnunet.system.children import others_children


def plan_and_preprocess(dataset: str, configuration: str, num_processes: int, log_file: Path | None = None) -> Path:
    """Fingerprint, plan and preprocess a raw data set; returns its folder in nnUNet_preprocessed.

    nnU-Net's messages go to `log_file` (None: they are dropped). Raises NotFoundError for unset folders or an unknown
    data set, SpecError for a name nnU-Net cannot plan, BuildError when nnU-Net left no preprocessed case behind.
    """
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        nnunet_folder(name)
    dataset_name = resolve_dataset(dataset)
    dataset_id = dataset_number(dataset_name)
    if dataset_id is None:
        raise SpecError(
            f"{dataset_name}: nnU-Net plans by an id, and none stands for this name alone, expected Dataset042_Name or "
            "the like\nrename its folder in nnUNet_raw"
        )
    from fastnnunet.nnunet.v2 import extract_fingerprints, plan_experiments, preprocess

    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(log_file or os.devnull, "a"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(others_children())
        extract_fingerprints([dataset_id], num_processes=num_processes, check_dataset_integrity=True)
        plans_name = plan_experiments([dataset_id])
        preprocess([dataset_id], plans_name, configurations=[configuration], num_processes=[num_processes])
    folder = nnunet_folder("nnUNet_preprocessed") / dataset_name
    try:
        _, config = configuration_of(read_json(folder / f"{plans_name}.json"), configuration)
    except MismatchError as e:
        raise BuildError(f"nnU-Net planned {dataset_name} otherwise: {e}") from e
    data = folder / config.data_identifier
    if not data.is_dir() or not any(data.iterdir()):
        raise BuildError(f"nnU-Net preprocessed no case into {data}; see {log_file or 'its own output'}")
    return folder
