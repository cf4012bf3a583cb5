import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ossnet.errors import SettingsError
from ossnet.field.engine.blockwise.receptive import receptive_halo
from ossnet.networks.multiscale import (
    Convolution,
    MultiscaleNetwork,
    MultiscaleSpec,
    Stage,
    gather_patches,
    offsets_in_cells,
    positions_in_scan,
    sample,
    to_cells,
)
from ossnet.networks.multiscale_plan import CROP_VOXELS, plan

STAGES = (
    Stage((2, 2, 2), (3, 3, 3), 4, 0, 1, 4),
    Stage((2, 2, 2), (3, 3, 3), 8, 0, 1, 8),
    Stage((2, 2, 1), (3, 3, 3), 8, 1, 0, 6),
    Stage((2, 2, 2), (3, 3, 3), 8, 1, 0, 6),
)
SMALL = MultiscaleSpec(1, 1, (1.0, 1.0, 2.0), STAGES, (3, 3, 1), decoder_width=16, decoder_blocks=1)


def test_spec_survives_json() -> None:
    assert MultiscaleSpec.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


def test_spec_refuses_what_has_no_meaning() -> None:
    with pytest.raises(SettingsError, match="above 0"):
        replace(SMALL, spacing=(1.0, 0.0, 1.0))
    with pytest.raises(SettingsError, match="odd"):
        replace(SMALL, patch=(4, 3, 3))
    with pytest.raises(SettingsError, match="at least one"):
        replace(SMALL, classes=0)
    with pytest.raises(SettingsError, match="strides"):
        replace(SMALL, stages=(replace(STAGES[0], stride=(3, 2, 2)),))


@pytest.mark.parametrize("classes", [1, 4])
def test_shapes_and_gradient_reach_every_weight(classes: int) -> None:
    network = MultiscaleNetwork(replace(SMALL, classes=classes, channels=2))
    logits, coarse = network(torch.randn(2, 2, 32, 16, 16), torch.rand(2, 50, 3) * 16)
    assert logits.shape == (2, 50, classes)
    assert coarse.shape == (2, classes, 4, 2, 4)
    # One step first: the last map of each decoder block starts at zero and hides what lies before it.
    for block in network.decoder.blocks:
        torch.nn.init.normal_(block[3].weight)
    logits, coarse = network(torch.randn(2, 2, 32, 16, 16), torch.rand(2, 50, 3) * 16)
    (logits.square().mean() + coarse.square().mean()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_starts_with_unit_scale() -> None:
    torch.manual_seed(0)
    chosen = plan((1.0, 1.0, 1.0), (64, 64, 64), 1, 1)
    maps = MultiscaleNetwork(chosen.spec).maps(torch.randn(1, 1, 64, 64, 64))
    for m in maps:
        assert 0.1 < float(m.detach().std()) < 3


def test_convolutions_are_found_as_such_and_start_with_unit_rows() -> None:
    network = MultiscaleNetwork(SMALL)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
    assert convolutions
    assert all(isinstance(m, Convolution) for m in convolutions)
    for m in convolutions:
        rows = m.weight.detach().flatten(1).norm(dim=1)
        assert float(rows.mean()) == pytest.approx(1, abs=0.3)


def test_sample_is_trilinear_and_clamped() -> None:
    x, y, z = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), torch.arange(6.0), indexing="ij")
    values = torch.stack([x + 10 * y, z])[None]
    cells = torch.tensor([[[0.25, 3.5, 2.75], [-1.0, 9.0, 5.5]]])
    expected = torch.tensor([[[35.25, 2.75], [40.0, 5.0]]])
    assert torch.allclose(sample(values, cells), expected)


def test_sample_equals_grid_sample() -> None:
    torch.manual_seed(0)
    values, cells = torch.randn(2, 3, 4, 5, 6), torch.rand(2, 40, 3) * torch.tensor([4.0, 5.0, 6.0]) - 0.5
    size = torch.tensor([4.0, 5.0, 6.0])
    grid = ((2 * cells + 1) / size - 1).flip(-1)[:, :, None, None]
    expected = torch.nn.functional.grid_sample(values, grid, padding_mode="border", align_corners=False)
    assert torch.allclose(sample(values, cells), expected[..., 0, 0].transpose(1, 2), atol=1e-5)


def test_sample_of_a_single_slice() -> None:
    values = torch.arange(4.0).view(1, 1, 4, 1, 1)
    assert sample(values, torch.tensor([[[1.5, 0.3, -0.2]]])).item() == pytest.approx(1.5)


def test_cells_are_centred_on_their_voxels() -> None:
    voxels = torch.tensor([[0.0, 1.0, 2.0]])
    assert torch.allclose(to_cells(voxels, (1, 2, 4)), torch.tensor([[0.0, 0.25, 0.125]]))


def test_patches_are_the_neighbours_and_repeat_the_border() -> None:
    volume = torch.arange(2 * 27.0).view(1, 2, 3, 3, 3)
    patches = gather_patches(volume, torch.tensor([[[1.0, 1.0, 1.0], [-0.4, 0.4, 2.0]]]), (3, 1, 3))
    assert torch.equal(patches[0, 0], torch.cat([volume[0, c, :, 1, :].flatten() for c in (0, 1)]))
    assert torch.equal(patches[0, 1, :9], volume[0, 0, [0, 0, 1], 0][:, [1, 2, 2]].flatten())


def test_offsets_are_in_millimetres() -> None:
    offsets = offsets_in_cells(torch.tensor([[2.25, 3.0, 5.75]]), SMALL)
    # Voxel offsets 0.25, 0 and -0.25 of 1, 1, 2 mm; cell centres (stride 2) at 2.5, 2.5 and 6.5 - 2 = 4.5.
    expected = torch.tensor([[0.25, 0.0, -0.25 * 2, -0.25, 0.5, -0.75 * 2]]) * 2
    assert torch.allclose(offsets[:, :5], expected[:, :5])


def test_positions_reach_from_border_to_border() -> None:
    shape = torch.tensor([4.0, 1.0, 10.0])
    found = positions_in_scan(torch.tensor([[-0.5, -0.5, -0.5], [1.5, 0.0, 4.5], [3.5, 0.5, 9.5]]), shape)
    assert found.tolist() == [[-1, -1, -1], [0, 0, 0], [1, 1, 1]]


@settings(max_examples=60)
@given(
    spacing=st.tuples(*[st.floats(0.3, 10)] * 3),
    shape=st.tuples(*[st.integers(1, 700)] * 3),
    classes=st.sampled_from([1, 3]),
)
def test_plans_follow_the_spacing(
    spacing: tuple[float, float, float], shape: tuple[int, int, int], classes: int
) -> None:
    chosen = plan(spacing, shape, 1, classes)
    assert {"stages", "crop"} <= {reason.split()[0].rstrip(":") for reason in chosen.reasons}
    mm = np.array(spacing)
    for stage, (before, after) in zip(
        chosen.spec.stages, pairwise([(1, 1, 1), *chosen.spec.strides]), strict=True
    ):
        # Axes of fewer than 8 cells keep them; the others are measured against each other.
        some = np.ceil(np.array(shape) / before) >= 8
        if not some.any():
            assert stage.stride == (1, 1, 1)
            continue
        for cells, steps in ((mm * np.array(before), stage.stride), (mm * np.array(after), stage.kernel)):
            for axis in range(3):
                if cells[axis] >= 2 * cells[some].min():
                    assert steps[axis] == 1
    assert all(c % s == 0 for c, s in zip(chosen.crop, chosen.spec.strides[-1], strict=True))
    assert np.prod(chosen.crop) <= max(CROP_VOXELS, np.prod(chosen.spec.strides[-1]))
    assert MultiscaleSpec.from_dict(chosen.spec.to_dict()) == chosen.spec


@pytest.mark.parametrize(
    ("shape", "across"),
    [
        ((256, 256, 1), 0.1),
        ((256, 256, 1), 1.0),
        ((128, 128, 16), 1.0),
        ((256, 256, 24), 1.0),
        ((256, 256, 24), 3.0),
        ((128, 256, 3), 0.5),
        ((128, 256, 6), 3.0),
    ],
)
def test_slabs_and_slices_are_seen_in_their_plane(shape: tuple[int, int, int], across: float) -> None:
    """Their few slices cannot be halved, and are no reason to look no further in the plane."""
    spec = plan((1.0, 1.0, across), shape, 1, 1).spec
    assert all(stage.kernel[:2] == (3, 3) for stage in spec.stages)
    assert spec.strides[-1][0] >= 8
    assert spec.patch[:2] == (5, 5)
    assert min(receptive_halo(spec)[:2]) >= 60


def test_known_plans() -> None:
    heart = plan((1.5, 1.5, 10.0), (170, 176, 10), 1, 4)
    assert heart.spec.stages[0].stride == (2, 2, 1)
    assert heart.spec.stages[0].kernel == (3, 3, 1)
    assert heart.spec.patch == (5, 5, 1)
    hippocampus = plan((1.0, 1.0, 1.0), (35, 50, 36), 1, 3)
    assert hippocampus.spec.stages[0].stride == (1, 1, 1)
    assert all(c >= n for c, n in zip(hippocampus.crop, (35, 50, 36), strict=True))
    atrium = plan((0.625,) * 3, (183, 145, 88), 1, 1)
    assert atrium.spec.strides[-1] == (16, 16, 16)
