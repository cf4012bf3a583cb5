"""Declarations: the paper's sizes, generic sizes, JSON, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ossnet.errors import SettingsError
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import (
    PAPER_VARIANTS,
    VARIANTS,
    NetworkSpec,
    admissible_shape,
    block_channels,
    block_count,
    spec_for,
    variant_named,
)

BRATS, LITS = (256, 256, 160), (512, 512, 512)


@pytest.mark.parametrize(
    ("variant", "brats", "lits", "entries"),
    [
        ("O-Net", 6_890_753, 9_057_237, (190, 207)),
        ("A", 7_245_438, 9_409_177, (198, 215)),
        ("B", 7_254_358, 9_409_520, (198, 215)),
        ("C", 8_695_733, 10_866_490, (231, 256)),
        ("D", 8_704_653, 10_866_833, (231, 256)),
        ("vanilla_o_net", 3_309_313, 4_394_453, (190, 207)),
    ],
)
def test_parameters_and_entries_of_the_paper(
    variant: str, brats: int, lits: int, entries: tuple[int, int]
) -> None:
    for shape, channels, parameters, count in (
        (BRATS, 4, brats, entries[0]),
        (LITS, 1, lits, entries[1]),
    ):
        with torch.device("meta"):
            network = OSSNet(spec_for(variant, channels, 1, shape))
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert len(network.state_dict()) == count


def test_parts_of_the_paper() -> None:
    """SPEC §2 "Parts": encoder and patch encoder, BraTS."""
    with torch.device("meta"):
        c = OSSNet(spec_for("C", 4, 1, BRATS))
        b = OSSNet(spec_for("B", 4, 1, BRATS))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(c.encoder) == 2_357_716
    assert count(b.encoder) == 907_421
    assert count(c.decoder.patch_mapping) == 3_453
    assert count(b.decoder.patch_mapping) == 12_373


def test_sizes_of_the_paper() -> None:
    brats, lits = spec_for("C", 4, 1, BRATS), spec_for("C", 1, 1, LITS)
    assert (brats.blocks, brats.grid, brats.latent_length) == ((16, 32, 64, 128), (8, 8, 5), 320)
    assert (brats.encoder_shape, brats.shape) == ((128, 128, 80), BRATS)
    assert (lits.blocks, lits.grid, lits.latent_length) == ((8, 16, 32, 64, 128), (8, 8, 8), 512)
    assert (lits.encoder_shape, lits.latent_rows) == ((256, 256, 256), 6)


@given(st.tuples(*[st.integers(1, 1500)] * 3))
def test_any_size_of_scan_has_a_network(size: tuple[int, int, int]) -> None:
    shape = admissible_shape(size)
    assert all(s >= n for s, n in zip(shape, size, strict=True))
    spec = spec_for("C", 1, 1, shape, block_channels(block_count(size)))
    assert spec.shape == shape
    assert max(spec.grid) <= 8
    if max(size) >= 17:
        assert max(spec.grid) >= 5
    assert spec.blocks[-1] >= 64
    assert list(spec.blocks) == sorted(spec.blocks)


@pytest.mark.parametrize("variant", PAPER_VARIANTS)
@pytest.mark.parametrize("classes", [1, 3])
def test_declarations_survive_json(variant: str, classes: int) -> None:
    spec = spec_for(variant, 2, classes, (64, 64, 32))
    assert NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_names_in_any_case() -> None:
    assert [variant_named(n)[0] for n in ("c", "onet", "O_Net", "D1")] == ["C", "O-Net", "O-Net", "D1"]
    assert PAPER_VARIANTS == ("O-Net", "A", "B", "C", "D")
    assert set(PAPER_VARIANTS) < set(VARIANTS)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(SettingsError, match=r"unknown.*O-Net, A, B, C, D"):
        spec_for("E", 1, 1, (64, 64, 64))
    with pytest.raises(SettingsError, match=r"multiple of 32.*Use \(256, 256, 160\)"):
        spec_for("C", 4, 1, (240, 240, 155))
    with pytest.raises(SettingsError, match="no segmentation head"):
        replace(spec_for("A", 1, 1, (64, 64, 64)), head=True)
    with pytest.raises(SettingsError, match=r"widht.*unknown key.*width"):
        NetworkSpec.from_dict({"variant": "C", "channels": 1, "widht": 3})
    with pytest.raises(SettingsError, match=r"network\.channels.*missing"):
        NetworkSpec.from_dict({"variant": "C"})
    for wrong in (
        {"channels": 0},
        {"classes": 0},
        {"blocks": ()},
        {"grid": (1, 0, 1)},
        {"fourier": -1},
        {"skip": True, "blocks": (1, 2)},
    ):
        with pytest.raises(SettingsError):
            replace(NetworkSpec(variant="A", channels=1), **wrong)
