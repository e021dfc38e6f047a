"""Batch norm folded into the convolutions before it: at prediction it is one factor and one summand a channel.

A bundle of such a network holds the network without its norms: other engines fold too, but not all and not across
int8, the torch engine not at all, and only without them every node of the graph looks at its surroundings alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastnnunet.nnunet.files.model import Model, build_network
from fastnnunet.nnunet.files.plans import architecture_of
from fastnnunet.nnunet.student.inherit import Layer, read_layers
from fastnnunet.specs.checks.networks import find_arguments, find_network

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """How the norms of a network go."""

    model: Model
    architecture: dict[str, Any]  # of the network without them
    layers: tuple[Layer, ...]

    def apply(self, network: "torch.nn.Module") -> "torch.nn.Module":
        """A network without norms that computes what `network` computes in eval mode; computed in float64."""
        import torch

        weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        made = self._build().eval()
        own = dict(made.named_parameters())  # each tensor once, though state dicts name some twice
        values = {name: weights.get(name, torch.zeros_like(own[name])).double() for name in own}
        for layer in self.layers:
            norm = {kind: weights[f"{layer.norm}.{kind}"].double() for kind in ("weight", "bias")}
            mean, var = (weights[f"{layer.norm}.running_{kind}"].double() for kind in ("mean", "var"))
            factor = norm["weight"] / torch.sqrt(var + network.get_submodule(str(layer.norm)).eps)
            weight = weights[f"{layer.name}.weight"].double()
            values[f"{layer.name}.weight"] = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
            shift = norm["bias"] - mean * factor
            if f"{layer.name}.bias" in weights:
                shift = shift + weights[f"{layer.name}.bias"].double() * factor
            values[f"{layer.name}.bias"] = shift
        for shortcut in [name for name in values if name not in own]:  # it has no bias and is added to conv2's output
            values[shortcut.rsplit(".skip.", 1)[0] + ".conv2.conv.bias"] += values.pop(shortcut)
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
        return made

    def _build(self) -> "torch.nn.Module":
        """As the torch engine builds it; nnU-Net's own way sets first weights of norms."""
        network_class = find_network(self.architecture["network_class_name"])
        return network_class(
            input_channels=self.model.num_channels,
            num_classes=self.model.num_heads,
            deep_supervision=False,
            **find_arguments(self.architecture),
        )


def folding_of(model: Model, network: "torch.nn.Module") -> Folding | None:
    """How to fold the norms of `network`; None where it has none that can be, or not all can be.

    All are batch norms with statistics, each right after a convolution, in a U-Net that is what the plans describe.
    """
    import torch

    architecture = architecture_of(model.plans, model.configuration)
    kwargs: dict[str, Any] = architecture["arch_kwargs"]
    norms = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    if not norms or "BatchNorm" not in str(kwargs.get("norm_op")) or kwargs.get("nonlin_first"):
        return None
    layers = tuple(layer for layer in read_layers(network.state_dict()) if layer.norm is not None)
    if {layer.norm for layer in layers} != norms.keys() or not all(m.track_running_stats for m in norms.values()):
        return None
    with torch.device("meta"):
        if str(build_network(model)) != str(network):  # a trainer's own
            return None
    kwargs |= {"norm_op": None, "norm_op_kwargs": None, "conv_bias": True}
    return Folding(model=model, architecture=architecture, layers=layers)
