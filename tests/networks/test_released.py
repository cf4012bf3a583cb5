"""Weight files: what is read out of them, and what is refused."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ossnet.errors import ModelError
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.released import infer_spec, read_released
from ossnet.networks.variants import VARIANTS, NetworkSpec, spec_for


def write(path: Path, spec: NetworkSpec) -> dict[str, Tensor]:
    state = OSSNet(spec).state_dict()
    torch.save(state, path)
    return state


def small(variant: str = "C") -> NetworkSpec:
    return replace(spec_for(variant, 2, 1, (16, 16, 8), blocks=(4, 6)), width=8)


@settings(max_examples=30)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    channels=st.integers(1, 5),
    classes=st.integers(1, 4),
    blocks=st.lists(st.integers(2, 9), min_size=1, max_size=5),
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    width=st.integers(1, 40),
    decoder_blocks=st.integers(1, 6),
    statistics=st.sampled_from(["scalar", "feature"]),
)
def test_everything_is_read_from_the_state_dict(
    variant: str,
    channels: int,
    classes: int,
    blocks: list[int],
    grid: tuple[int, int, int],
    width: int,
    decoder_blocks: int,
    statistics: str,
) -> None:
    parts = VARIANTS[variant]
    spec = NetworkSpec(
        variant=variant,
        channels=channels,
        classes=classes,
        blocks=tuple(blocks),
        grid=grid,
        patches=parts.patches,
        skip=parts.skip,
        head=parts.head,
        width=width,
        decoder_blocks=decoder_blocks,
        fourier=parts.fourier,
        cbn_statistics="scalar" if statistics == "scalar" or width == 1 else "feature",
    )
    with torch.device("meta"):
        state = OSSNet(spec).state_dict()
    inferred = infer_spec(state, "weights.pt", grid)
    # The head's and the O-Net's names depend on the width alone.
    assert replace(inferred, variant=variant) == spec
    if variant not in ("O-Net", "vanilla_o_net"):
        assert inferred.variant == variant


@pytest.mark.parametrize(("shape", "channels"), [((256, 256, 160), 4), ((512, 512, 512), 1)])
def test_the_papers_grids_need_not_be_given(shape: tuple[int, int, int], channels: int) -> None:
    spec = spec_for("C", channels, 1, shape)
    with torch.device("meta"):
        state = OSSNet(spec).state_dict()
    assert infer_spec(state, "weights.pt") == spec


def test_released_extras_by_their_names() -> None:
    for name in ("vanilla_o_net", "O-Net", "C1", "D2"):
        spec = spec_for(name, 4, 1, (256, 256, 160))
        with torch.device("meta"):
            state = OSSNet(spec).state_dict()
        assert infer_spec(state, "weights.pt").variant == name


@pytest.mark.parametrize("form", ["plain", "module.", "wrapped", "double", "legacy"])
def test_forms_of_files(tmp_path: Path, form: str) -> None:
    file, spec = tmp_path / "w.pt", small()
    state = write(file, spec)
    if form == "module.":
        torch.save({f"module.{k}": v for k, v in state.items()}, file)
    elif form == "wrapped":
        torch.save({"state_dict": state}, file)
    elif form == "double":
        torch.save({k: v.double() if v.is_floating_point() else v for k, v in state.items()}, file)
    elif form == "legacy":
        torch.save(dict(state), file, _use_new_zipfile_serialization=False)
    read, weights = read_released(file, spec.grid)
    assert read == spec
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[k], state[k]) and weights[k].dtype == state[k].dtype for k in state)
    OSSNet(read).load_state_dict(weights, strict=True)


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("__import__('os').environ.update(OSSNET_RAN='1')",))


def test_files_that_are_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSSNET_RAN", raising=False)
    whole = tmp_path / "whole.pt"
    state = write(whole, small())
    content = whole.read_bytes()
    files = {
        "absent.pt": None,
        "empty.pt": b"",
        "text.pt": b"not weights\n",
        "cut.pt": content[: len(content) // 2],
        "cut_early.pt": content[:100],
        "noise.pt": bytes(range(256)) * 40,
        "code.pt": pickle.dumps({"a": _Code()}),
    }
    for name, data in files.items():
        file = tmp_path / name
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            read_released(file, (2, 2, 1))
    (tmp_path / "folder.pt").mkdir()
    objects = {
        "code2.pt": {**state, "extra": _Code()},
        "list.pt": [1, 2],
        "tensor.pt": torch.zeros(3),
        "nothing.pt": {},
        "numbers.pt": {"a": 1},
        "other.pt": {"conv.weight": torch.zeros(3)},
    }
    for name, value in objects.items():
        torch.save(value, tmp_path / name)
    for name in ("folder.pt", *objects):
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            read_released(tmp_path / name, (2, 2, 1))
    import os

    assert "OSSNET_RAN" not in os.environ


def test_differences_are_named(tmp_path: Path) -> None:
    spec = small()
    state = write(tmp_path / "w.pt", spec)
    key = "decoder.blocks.1.cnb_2.linear_beta.bias"

    def refused(changed: dict[str, Tensor], grid: tuple[int, int, int] | None = spec.grid) -> str:
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(ModelError) as caught:
            read_released(tmp_path / "x.pt", grid)
        return str(caught.value)

    without = {k: v for k, v in state.items() if k != key}
    assert f"missing: {key}" in refused(without)
    assert "unknown: decoder.more" in refused({**state, "decoder.more": torch.zeros(1)})
    assert f"wrong shape: {key} (3,) instead of (8,)" in refused({**state, key: torch.zeros(3)})
    assert f"wrong type: {key}" in refused({**state, key: torch.zeros(8, dtype=torch.int64)})
    assert f"not finite: {key}" in refused({**state, key: torch.full((8,), torch.nan)})
    variance = "encoder.blocks.0.main_mapping.1.running_var"
    assert f"negative: {variance}" in refused({**state, variance: -state[variance]})
    first = "encoder.blocks.0.main_mapping.0.weight"
    assert f"{first} is missing" in refused({k: v for k, v in state.items() if k != first})
    patch = "decoder.patch_mapping.mapping.0.weight"
    assert "neither 2 nor 4" in refused({**state, patch: torch.zeros(1, 3, 7, 7, 7)})
    gap = {k.replace("encoder.blocks.0.", "encoder.blocks.7."): v for k, v in state.items()}
    assert "encoder.blocks.0" in refused(gap)
    assert "--output-shape" in refused(dict(state), None)
    assert "product is 4" in refused(dict(state), (3, 2, 1))
    fewer = {k: v for k, v in state.items() if not k.startswith("encoder.blocks.1.")}
    assert "encoder.output_mappings.1" in refused(fewer, (4, 1, 1))
    both = {**state, f"module.{key}": state[key]}
    assert "module." in refused(both)
