"""Graphs of other shapes than the trained one: another patch size, dynamic space, folded constants, a fixed batch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet.errors import ParityError, SpecError
from fastnnunet.nnunet.files.plans import architecture_of, resolved, with_configuration
from fastnnunet.nnunet.student.fit import patch_problems, stride_products
from fastnnunet.nnunet.student.primus import is_primus
from fastnnunet.nnunet.versions import require_versions
from fastnnunet.specs.graph import GraphSpec

if TYPE_CHECKING:
    import onnx
    import torch


def plans_for(plans: dict[str, Any], configuration: str, graph: GraphSpec) -> dict[str, Any]:
    """The plans with the patch size asked for, which is what nnU-Net would predict with as well.

    A U-Net computes on any patch its strides divide. It still is another prediction: windows lie elsewhere, and
    instance norms see another part of the image. Raises SpecError for a network or a size that cannot be.
    """
    if graph.patch_size is None and not graph.dynamic_space:
        return plans
    config = resolved(plans, configuration)
    trained, architecture = list(config["patch_size"]), architecture_of(plans, configuration)
    if is_primus(architecture) or stride_products(config) is None:
        raise SpecError(
            f"{architecture['network_class_name']} computes on patches of {trained} only; other sizes and dynamic axes "
            "need a U-Net\nleave out --patch-size and --dynamic (-is, -da)"
        )
    if graph.patch_size is None:
        return plans
    patch_size = list(graph.patch_size)
    problems = (
        [f"got {patch_size}, expected {len(trained)} numbers, as in {trained}"]
        if len(patch_size) != len(trained)
        else patch_problems({**config, "patch_size": patch_size})
    )
    if problems:
        raise SpecError("--patch-size (-is): " + "; ".join(problems))
    return with_configuration(plans, configuration, patch_size=patch_size)


def larger_patches(image_NCX: np.ndarray, multiples: tuple[int, ...]) -> np.ndarray:
    """The patches continued periodically by one step along every axis: float32 (N, C, *larger)."""
    return np.pad(image_NCX, [(0, 0), (0, 0), *((0, m) for m in multiples)], mode="wrap")


def fold_constants(model: "onnx.ModelProto", network: "torch.nn.Module") -> None:
    """Compute once what depends on neither the input nor a weight; weights keep the names the bundle needs.

    Exported U-Nets have nothing of that kind. A Primus loses two fifths of its nodes and all operators on sequences,
    which not every engine knows.
    """
    from onnxscript import optimizer

    require_versions(["onnxscript"])
    weights = set(network.state_dict())
    before = {tensor.name for tensor in model.graph.initializer} & weights

    def should_fold(node: Any) -> bool | None:
        uses_weight = any(value is not None and value.name in weights for value in node.inputs)
        return False if uses_weight else None  # None: as the optimiser sees fit

    optimizer.fold_constants(model, should_fold=should_fold)
    optimizer.remove_unused_nodes(model)
    lost = before - {tensor.name for tensor in model.graph.initializer}
    if lost:
        raise ParityError(
            f"simplifying renamed {len(lost)} weights, first {min(lost)}, expected none\n"
            "export without --simplify (-sim), or install another version of onnxscript"
        )


def fix_batch(model_file: Path, batch_size: int) -> None:
    """Let the stored model take exactly `batch_size` patches."""
    import onnx

    model = onnx.load(str(model_file))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch_size
    del model.graph.value_info[:]  # shapes in between, with a dynamic batch
    model_file.write_bytes(onnx.shape_inference.infer_shapes(model).SerializeToString())
