"""Network families by name: how a declaration in a model folder becomes modules."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ossnet.errors import ModelError
from ossnet.networks.multiscale import MultiscaleNetwork, MultiscaleSpec
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.unet import UNet, UNetSpec
from ossnet.networks.variants import NetworkSpec

FAMILIES: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "ossnet": (NetworkSpec, OSSNet),
    "multiscale": (MultiscaleSpec, MultiscaleNetwork),
    "unet": (UNetSpec, UNet),
}
"""Family → (declaration, module). A declaration has `to_dict` and `from_dict`; a module keeps it as `spec`."""


def build(family: str, declaration: Mapping[str, Any]) -> nn.Module:
    """A network with fresh weights.

    Raises:
        ModelError: The family is unknown, as in a model of a later version.
    """
    if family not in FAMILIES:
        raise ModelError(
            f"network family {family!r}",
            "it is unknown to this version",
            "Update ossnet, or use another model",
        )
    spec, module = FAMILIES[family]
    return module(spec.from_dict(declaration))


def family_of(network: nn.Module) -> str:
    """The family's name of a built network."""
    return next(name for name, (_, module) in FAMILIES.items() if isinstance(network, module))
