"""The authors' weight files: everything is read from the state dict itself (SPEC §2, end).

This module reads a file of weights, which is all it shares with the outside: images stay in `files`.
"""

import re
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ossnet.errors import ModelError, SettingsError
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.patches import LOCAL_FEATURES
from ossnet.networks.variants import VARIANTS, NetworkSpec, Patches, Shape, Variant

KNOWN_GRIDS: Mapping[int, Shape] = {320: (8, 8, 5), 512: (8, 8, 8)}
"""Low-resolution grids by their number of cells: BraTS and LiTS. The grid is not in the file (SPEC §7.37)."""

_SHOWN = 5


def read_released(
    path: Path | str, output_shape: Shape | None = None
) -> tuple[NetworkSpec, dict[str, Tensor]]:
    """Read a state dict of the released network classes, whatever its sizes.

    Nothing in the file is executed (`weights_only`).

    Args:
        path: File written by `torch.save`; keys may have the prefix `module.` of data-parallel training, the
            weights may lie under a key `state_dict`.
        output_shape: Low-resolution grid; needed where its number of cells is neither 320 (BraTS: 8, 8, 5)
        nor
            512 (LiTS: 8, 8, 8).

    Returns:
        The declaration, and float32 weights that load into `OSSNet(spec)` with `strict=True`.

    Raises:
        ModelError: If the file is no such state dict, naming the entries that are missing, left over or of
        the
            wrong shape; or if the grid is unknown or does not fit.
    """
    path = Path(path)
    state = _state_dict(path)
    spec = infer_spec(state, str(path), output_shape)
    return spec, _matched(state, spec, path)


def infer_spec(state: Mapping[str, Tensor], where: str, output_shape: Shape | None = None) -> NetworkSpec:
    """The declaration behind a state dict (without prefix), from its keys and shapes.

    Args:
        state: Entries of SPEC §2 "State-dict keys".
        where: What errors name, such as the file.
        output_shape: See `read_released`.

    Raises:
        ModelError: If the shapes contradict each other or the grid is unknown.
    """
    reader = _Reader(state, where)
    channels = reader.size("encoder.blocks.0.main_mapping.0.weight", 1)
    blocks = tuple(
        reader.size(f"encoder.blocks.{i}.main_mapping.0.weight", 0)
        for i in range(reader.count(r"encoder\.blocks\.(\d+)\."))
    )
    width = reader.size("decoder.blocks.0.cnb_1.linear_gamma.weight", 0)
    length = reader.size("decoder.blocks.0.cnb_1.linear_gamma.weight", 1)
    statistics = reader.size("decoder.blocks.0.cnb_1.normalization.running_mean", 0)
    patches = reader.patches(channels)
    fourier = reader.size("decoder.b", 2) if "decoder.b" in state else 0
    skip = reader.any("encoder.output_mappings.")
    head = reader.any("encoder.segmentation_mapping.")
    reader.check_input_width(length, fourier, patches)
    try:
        return NetworkSpec(
            variant=_name(Variant(patches=patches, skip=skip, head=head, width=width, fourier=fourier)),
            channels=channels,
            classes=reader.size("decoder.final_mapping.0.weight", 0),
            blocks=blocks,
            grid=_grid(length, output_shape, where),
            patches=patches,
            skip=skip,
            head=head,
            width=width,
            decoder_blocks=reader.count(r"decoder\.blocks\.(\d+)\."),
            fourier=fourier,
            cbn_statistics="scalar" if statistics == 1 else "feature",
        )
    except SettingsError as error:
        raise ModelError(
            where, f"its sizes contradict each other: {error.where} {error.reason}", _FIX
        ) from error


_FIX = "Give a weight file of OSS-Net variant A, B, C or D, or of an O-Net, as torch.save wrote it"


class _Reader:
    """Sizes out of a state dict; what is not there is named in the error."""

    def __init__(self, state: Mapping[str, Tensor], where: str) -> None:
        self.state, self.where = state, where

    def size(self, key: str, axis: int) -> int:
        if key not in self.state:
            raise ModelError(self.where, f"{key} is missing", _FIX)
        shape = self.state[key].shape
        if axis >= len(shape) or shape[axis] < 1:
            raise ModelError(self.where, f"{key} has the shape {tuple(shape)}", _FIX)
        return int(shape[axis])

    def any(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.state)

    def count(self, pattern: str) -> int:
        """Number of consecutive indices from 0; the comparison with the network finds gaps."""
        found = {int(m[1]) for key in self.state if (m := re.match(pattern, key))}
        return next(i for i in range(len(found) + 1) if i not in found)

    def patches(self, channels: int) -> Patches:
        if not self.any("decoder.patch_mapping."):
            return "none"
        fed = self.size("decoder.patch_mapping.mapping.0.weight", 1)
        if fed == channels:
            return "small"
        if fed == 2 * channels:
            return "small+large"
        raise ModelError(
            self.where, f"patches have {fed} channels, which is neither {channels} nor {2 * channels}", _FIX
        )

    def check_input_width(self, length: int, fourier: int, patches: Patches) -> None:
        """Tells a wrong kind of input apart from a wrong size, before whole tensors are compared."""
        expected = 2 * fourier + 3 + (0 if patches == "none" else LOCAL_FEATURES) + length
        actual = self.size("decoder.blocks.0.linear_layer_1.weight", 1)
        if actual != expected:
            raise ModelError(
                self.where, f"the decoder reads {actual} features where its other parts make {expected}", _FIX
            )


def _grid(length: int, output_shape: Shape | None, where: str) -> Shape:
    if output_shape is None:
        if length in KNOWN_GRIDS:
            return KNOWN_GRIDS[length]
        raise ModelError(
            where,
            f"the low-resolution grid of {length} cells is not stored in the file",
            "Give its shape, for example --output-shape 8,8,5 (output_shape=(8, 8, 5)):"
            " the full resolution divided by 2 to the power of encoder blocks + 1",
        )
    if len(output_shape) != 3 or min(output_shape) < 1 or prod(output_shape) != length:
        raise ModelError(
            where,
            f"the low-resolution grid has {length} cells, the output shape {output_shape} does not",
            f"Give three numbers whose product is {length}",
        )
    return output_shape


def _name(parts: Variant) -> str:
    """The variant with these parts. Reduced widths keep the paper's name; 256 without patches has its own."""
    kind = (parts.patches, parts.skip, parts.head, parts.fourier > 0)
    matching = [name for name, v in VARIANTS.items() if (v.patches, v.skip, v.head, v.fourier > 0) == kind]
    exact = [name for name in matching if VARIANTS[name].width == parts.width]
    return (exact or matching or ["custom"])[0]


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Load without executing anything, unwrap, strip prefixes."""
    if not path.is_file():
        raise ModelError(path, "there is no such file", "Check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on foreign pickles; the error says enough
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ModelError(
            path,
            "it holds more than plain tensors, or is not a weight file",
            "Give a weight file as torch.save wrote it; code in files is never run",
        ) from error
    except MemoryError as error:
        raise ModelError(path, "it does not fit into memory", "Check that this is a weight file") from error
    # Damaged and foreign files end in a dozen kinds of exceptions (zip, unpickler, key, index, unicode, …).
    except Exception as error:
        raise ModelError(
            path,
            f"it cannot be read as weights ({_first_line(error)})",
            "Download or copy it again; only plain tensors saved by torch.save are read, never code",
        ) from error
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ModelError(path, f"it holds a {type(loaded).__name__}, not a state dict", _FIX)
    state: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.device.type != "cpu":
            raise ModelError(path, f"its entry {key!r} is not a tensor", _FIX)
        state[key.removeprefix("module.")] = value
    if len(state) != len(loaded):
        raise ModelError(path, "keys appear both with and without the prefix module.", _FIX)
    return state


def _matched(state: Mapping[str, Tensor], spec: NetworkSpec, path: Path) -> dict[str, Tensor]:
    """The entries in the network's types, or an error that names every kind of difference."""
    with torch.device("meta"):
        expected = OSSNet(spec).state_dict()
    problems = _difference("missing", expected.keys() - state.keys()) + _difference(
        "unknown", state.keys() - expected.keys()
    )
    shared = [key for key in expected if key in state]
    problems += _difference(
        "of the wrong shape",
        {
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in shared
            if state[key].shape != expected[key].shape
        },
    )
    problems += _difference(
        "of the wrong type",
        {
            f"{key} ({state[key].dtype})"
            for key in shared
            if state[key].is_floating_point() != expected[key].is_floating_point()
            or state[key].layout != torch.strided
        },
    )
    if not problems:
        problems = _difference(
            "not finite", {key for key in shared if not bool(torch.isfinite(state[key]).all())}
        )
    if not problems:
        variances = [key for key in shared if key.endswith("running_var")]
        problems = _difference("negative", {key for key in variances if bool((state[key] < 0).any())})
    if problems:
        raise ModelError(path, f"read as variant {spec.variant}, entries are " + "; ".join(problems), _FIX)
    # Copies: a tensor of the file may be a view of a larger storage.
    return {
        key: state[key].detach().to(value.dtype).clone(memory_format=torch.contiguous_format)
        for key, value in expected.items()
    }


def _difference(kind: str, names: set[str]) -> list[str]:
    if not names:
        return []
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{kind}: {', '.join(shown)}{more}"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
