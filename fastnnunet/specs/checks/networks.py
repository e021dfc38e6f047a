"""Names in models and what they stand for: networks and layers of a list, and nothing else.

A plans.json, bundle.json or student file names the class of its network and of the layers in it. Whoever looks such a
name up as Python would runs the code of a stranger (`torch.nn.parallel.distributed.os.system` is a name). Here a name
is `MODULE.Class`: MODULE is on a list, is imported as it is, and has to be where the class is defined or a package that
re-exports it; the class has to be a torch Module defined in a module of the list. Attributes are never walked through.

Classes of the user's own need `allow_code` (`--allow-code`), which looks names up as nnU-Net does.
"""

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastnnunet.errors import MismatchError

# A variable of the environment, because loader, builder and benchmark processes have to know as well.
ALLOW_CODE_VARIABLE = "FASTNNUNET_ALLOW_CODE"
ALLOW_CODE_OPTION = "--allow-code"

_DNA = "dynamic_network_architectures"
# where networks are defined; dinov2_eva is left out because it unpickles files that its arguments name
NETWORK_MODULES = (
    *(f"{_DNA}.architectures.{name}" for name in ("unet", "primus", "resnet", "vgg")),
    "fastnnunet.nnunet.student.primus",
)
# where layers are defined; none of these classes does more than compute
LAYER_MODULES = (
    *(
        f"torch.nn.modules.{name}"
        for name in (
            *("activation", "batchnorm", "conv", "dropout", "instancenorm", "linear", "normalization", "padding"),
            *("pixelshuffle", "pooling", "upsampling"),
        )
    ),
    *(
        f"{_DNA}.building_blocks.{name}"
        for name in (
            *("eva", "patch_encode_decode", "plain_conv_encoder", "regularization", "residual", "residual_encoders"),
            *("simple_conv_blocks", "unet_decoder", "unet_residual_decoder"),
        )
    ),
)
# packages under which the same classes are known by a shorter name
_SHORT = ("torch.nn", "torch.nn.modules")


@contextmanager
def allow_code() -> Iterator[None]:
    """Within this block models may name any class that can be imported; for models whose origin you trust."""
    before = os.environ.get(ALLOW_CODE_VARIABLE)
    os.environ[ALLOW_CODE_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOW_CODE_VARIABLE]
        else:
            os.environ[ALLOW_CODE_VARIABLE] = before


def code_is_allowed() -> bool:
    """Whether `allow_code` holds, or the variable was set for this process."""
    return os.environ.get(ALLOW_CODE_VARIABLE) == "1"


def find_network(name: object, field: str = "network_class_name") -> type:
    """The network class of that name. Imports its module, hence torch.

    A class of dynamic_network_architectures whose module was renamed is found by its own name, as nnU-Net does.
    Raises MismatchError, naming `field`, for what is not on the list or not installed.
    """
    return _find(name, field, NETWORK_MODULES, "a network of dynamic_network_architectures")


def find_layer(name: object, field: str) -> type:
    """The layer (convolution, normalisation, block ...) of that name; as `find_network`."""
    return _find(name, field, LAYER_MODULES, "a layer of torch.nn or dynamic_network_architectures")


def find_arguments(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The `arch_kwargs` of an architecture with classes in place of the names in `_kw_requires_import`.

    Raises MismatchError.
    """
    arguments = dict(architecture["arch_kwargs"])
    for field in architecture["_kw_requires_import"]:
        if arguments.get(field) is not None:
            arguments[field] = find_layer(arguments[field], field)
    return arguments


def check_names(architecture: Mapping[str, Any]) -> None:
    """Refuse an architecture that names anything but networks and layers. Raises MismatchError."""
    find_network(architecture["network_class_name"])
    find_arguments(architecture)


def _find(name: object, field: str, modules: tuple[str, ...], expected: str) -> type:
    if not isinstance(name, str):
        raise MismatchError(f"{field}: got {_shown(name)}, expected the name of {expected}")
    if code_is_allowed():
        found = _locate(name)
        if isinstance(found, type):
            return found
    module, _, class_name = name.rpartition(".")
    for candidate in (module, *_moved_to(module, modules)):
        if candidate in modules or candidate in _SHORT:
            found = _attribute(candidate, class_name)
            if _is_layer_of(found, class_name, modules):
                return found
    raise MismatchError(
        f"{field}: got {_shown(name)}, expected {expected}: other code is not run\n"
        f"if it is your own, or you trust whoever made this model, give {ALLOW_CODE_OPTION} "
        "(in Python: with fastnnunet.specs.checks.networks.allow_code())"
    )


def _locate(name: str) -> Any:
    import pydoc  # takes longer to import than everything else here

    try:
        return pydoc.locate(name)
    except pydoc.ErrorDuringImport as e:
        raise MismatchError(f"{name} cannot be imported: {e}") from e


def _moved_to(module: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Where else to look for the class: modules of dynamic_network_architectures have been renamed before,
    and nnU-Net then looks for a class of that name in all its architectures.
    """
    parts = module.split(".")
    if parts[0] != _DNA or len(parts) > 3 or module in modules or not all(part.isidentifier() for part in parts):
        return ()
    return tuple(m for m in modules if m.startswith(f"{_DNA}.architectures."))


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as e:
        if e.name != module:  # a package that is not installed: the command line says which extra brings it
            raise
        return None  # this version of the package has no such module


def _is_layer_of(found: Any, name: str, modules: tuple[str, ...]) -> bool:
    return (
        isinstance(found, type)
        and found.__module__ in modules
        and found.__qualname__ == name
        and any((c.__module__, c.__qualname__) == ("torch.nn.modules.module", "Module") for c in found.__mro__)
    )


def _shown(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= 200 else text[:197] + "..."
