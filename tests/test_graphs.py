"""What the suite remembers of traces is what torch would trace again."""

import os
from pathlib import Path

import pytest
import torch

from fastnnunet.nnunet.onnx import to_onnx
from tests.graphs import UnknownError, remembering, structure_of


def network(slope: float = 0.1, seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.LeakyReLU(slope)).eval()


def test_a_remembered_graph_is_the_traced_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, export = [], torch.onnx.export
    real = getattr(export, "__wrapped__", export)

    def tell(*arguments: object, **options: object) -> object:
        traced.append(arguments[0])
        return real(*arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", remembering(tell, tmp_path))
    first, second, other = network(), network(seed=1), network(slope=0.2)
    models = [to_onnx(made, 1, (8, 8)) for made in (first, second, other)]
    assert traced == [first, other]
    monkeypatch.setattr(torch.onnx, "export", real)
    assert models[1].SerializeToString() == to_onnx(second, 1, (8, 8)).SerializeToString()
    assert models[0].graph.node[:] == models[1].graph.node[:]
    assert models[0].graph.node[:] != models[2].graph.node[:]


def test_what_a_trace_may_see_otherwise_is_another_structure() -> None:
    class Own(torch.nn.Module):
        pass

    example, made = torch.zeros(2, 1, 8, 8), network()
    known = structure_of(made, example, {})
    assert structure_of(network(seed=3), example, {}) == known
    assert structure_of(made, example[:, :, :4], {}) != known
    assert structure_of(made, example, {"opset_version": os.cpu_count()}) != known
    made[2].inplace = True
    assert structure_of(made, example, {}) != known
    hooked = torch.nn.Sequential(made)
    hooked.register_forward_hook(lambda *_: None)
    for strange in (Own(), torch.nn.Sequential(made, Own()), hooked):
        with pytest.raises(UnknownError):
            structure_of(strange, example, {})
