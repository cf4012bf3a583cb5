"""Models from the authors' weight files."""

from pathlib import Path
from typing import Literal

from ossnet.data.preparation import Preparation
from ossnet.errors import SettingsError
from ossnet.field.model import Model, versions
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.released import read_released
from ossnet.volume import Shape


def import_released(
    path: Path | str, output_shape: Shape | None = None, large_pool: Literal["avg", "released"] = "avg"
) -> Model:
    """A model from the authors' weight files (SPEC §2: everything is read from the state dict).

    Args:
        path: `oss_net_*.pt`; read without running code from it.
        output_shape: The low-resolution grid, where it cannot be inferred (SPEC §7.37).
        large_pool: How B and D pool their 14³ patches in dense inference; "released": by their maximum, as the
            authors' code does (SPEC §7.3).

    Raises:
        ModelError: No such network, or the grid must be given.
        SettingsError: There is no such way of pooling.
    """
    if large_pool not in ("avg", "released"):
        raise SettingsError("large_pool", f"{large_pool!r} is unknown", "Use avg or released")
    spec, weights = read_released(path, output_shape)
    network = OSSNet(spec)
    network.load_state_dict(weights, strict=True)
    # Four modalities, zero padded, are the paper's BraTS; one channel, resized, its LiTS (SPEC §1).
    padded = spec.channels > 1
    preparation = Preparation(orientation="file", fit="pad" if padded else "resize", shape=spec.shape)
    channels = ("flair", "t1", "t1ce", "t2") if spec.channels == 4 else ()
    return Model(
        network,
        preparation,
        {1: "foreground"} if spec.classes == 1 else {k: f"class {k}" for k in range(1, spec.classes)},
        channels,
        {
            "variant": spec.variant,
            "source": f"imported from {Path(path).name}",
            "settings": {"network": {"large_pool": large_pool}},
            "versions": versions(),
        },
    )
