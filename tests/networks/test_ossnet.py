"""The networks against the released ones, and what holds for each of them."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ossnet.networks.decoder import normalise_locations
from ossnet.networks.normalisation import ConditionalBatchNorm
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.released import read_released
from ossnet.networks.variants import VARIANTS, NetworkSpec, spec_for
from ossnet.training.losses import oss_net_loss

Read = Callable[[str], dict[str, Tensor]]
GRIDS = {
    "o_net": (3, 2, 2),
    "oss_net_a": (2, 2, 1),
    "oss_net_b": (3, 2, 2),
    "oss_net_c": (3, 2, 2),
    "oss_net_d": (2, 2, 1),
}


def load(folder: Path, name: str) -> OSSNet:
    spec, weights = read_released(folder / f"{name}.pt", GRIDS[name])
    network = OSSNet(spec)
    network.load_state_dict(weights, strict=True)
    return network


def tiny(variant: str = "C", classes: int = 1, **changes: object) -> NetworkSpec:
    return replace(spec_for(variant, 2, classes, (16, 16, 8), blocks=(4, 6)), width=16, **changes)


def inputs(spec: NetworkSpec, volumes: int = 2, count: int = 5) -> tuple[Tensor, Tensor, Tensor | None]:
    patches = torch.randn(volumes, count, spec.patch_channels, 7, 7, 7) if spec.patch_channels else None
    return (
        torch.randn(volumes, spec.channels, *spec.encoder_shape),
        torch.rand(volumes, count, 3) * 8,
        patches,
    )


def wake(network: OSSNet) -> OSSNet:
    """Conditions of a fresh network ignore the latent; give them weights."""
    for module in network.modules():
        if isinstance(module, ConditionalBatchNorm):
            nn.init.normal_(module.linear_gamma.weight, std=0.2)
            nn.init.normal_(module.linear_beta.weight, std=0.2)
    return network


@pytest.mark.parametrize("name", GRIDS)
def test_outputs_of_the_released_network(released: Path, arrays: Read, name: str) -> None:
    network, case = load(released, name).eval(), arrays(name)
    assert tuple(case["output_shape"].tolist()) == network.spec.grid
    with torch.no_grad():
        encoding = network.encode(case["volume"])
        logits = network.decode(case["locations"], case.get("patches"), encoding.latent)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(encoding.latent, case["latent"], **close)
    torch.testing.assert_close(logits.sigmoid()[..., None], case["occupancy"], **close)
    assert (encoding.segmentation is None) == ("low_res_segmentation" not in case)
    if encoding.segmentation is not None:
        torch.testing.assert_close(encoding.segmentation.sigmoid(), case["low_res_segmentation"], **close)


def test_training_step_of_the_released_network(released: Path, arrays: Read) -> None:
    network, case = load(released, "oss_net_c").train(), arrays("oss_net_c_training")
    out = network(case["volume"], case["locations"], case["patches"])
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(out.logits.sigmoid()[..., None], case["occupancy"], **close)
    torch.testing.assert_close(out.segmentation.sigmoid(), case["low_res_segmentation"], **close)
    loss = oss_net_loss(out.logits, case["labels"][..., 0], out.segmentation, case["low_res_label"])
    torch.testing.assert_close(loss.main, case["loss_main"], **close)
    torch.testing.assert_close(loss.auxiliary, case["loss_aux"], **close)
    torch.testing.assert_close(loss.total, case["loss_total"], **close)

    loss.total.backward()
    buffers = dict(network.named_buffers())
    after = {key.removeprefix("after/"): case[key] for key in case if key.startswith("after/")}
    assert after.keys() == buffers.keys()
    for key, value in after.items():
        torch.testing.assert_close(buffers[key], value, rtol=1e-5, atol=1e-5)
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(
            parameter.grad.norm(),
            case[f"grad_norm/{key}"],
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, k=key: f"{k}: {m}",
        )
        if f"grad/{key}" in case:
            torch.testing.assert_close(parameter.grad, case[f"grad/{key}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, classes: int, tmp_path: Path) -> None:
    """Shapes, a gradient for each weight, a location's answer independent of its company, save and load."""
    spec = tiny(variant, classes)
    network = wake(OSSNet(spec))
    volume, locations, patches = inputs(spec)
    logits, segmentation = network(volume, locations, patches)
    assert logits.shape == ((2, 5) if classes == 1 else (2, 5, classes))
    assert (segmentation is not None) == spec.head
    objective = logits.square().sum()
    if segmentation is not None:
        assert segmentation.shape == (2, max(classes - 1, 1), *spec.grid)
        objective = objective + segmentation.square().sum()
    objective.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name

    network.eval()
    with torch.no_grad():
        latent = network.encode(volume).latent
        assert latent.shape == (2, spec.latent_rows, spec.latent_length)
        together = network.decode(locations, patches, latent)
        for b in range(2):
            alone = network.decode(
                locations[b : b + 1, 2:3],
                None if patches is None else patches[b : b + 1, 2:3],
                latent[b : b + 1],
            )
            torch.testing.assert_close(alone[0, 0], together[b, 2], rtol=1e-4, atol=1e-5)

    torch.save(network.state_dict(), tmp_path / "w.pt")
    again = OSSNet(spec).eval()
    again.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(volume, locations, patches).logits, together)


def test_decoder_equals_its_definition() -> None:
    """The split first block against [h w d | local | latent] built for every location (SPEC §2)."""
    network = wake(OSSNet(tiny("C"))).eval()
    decoder = network.decoder
    volume, locations, patches = inputs(network.spec)
    with torch.no_grad():
        latent = network.encode(volume).latent
        row = torch.cat(
            [locations, decoder.patch_mapping(patches), latent[:, :1].expand(-1, locations.shape[1], -1)], -1
        )
        x = row
        for i, block in enumerate(decoder.blocks):
            x = block(x, latent[:, i + 1])
        expected = decoder.final_mapping(x)[..., 0]
        torch.testing.assert_close(network.decode(locations, patches, latent), expected, rtol=1e-4, atol=1e-5)


def test_first_block_as_wide_as_its_input_has_an_identity_shortcut() -> None:
    spec = tiny("O-Net")
    spec = replace(spec, width=3 + spec.latent_length)
    network = OSSNet(spec)
    assert "decoder.blocks.0.residual_mapping.weight" not in network.state_dict()
    assert network(*inputs(spec)).logits.shape == (2, 5)


def test_wrong_inputs_are_named() -> None:
    network = OSSNet(tiny("C"))
    volume, locations, patches = inputs(network.spec)
    with pytest.raises(ValueError, match=r"\(8, 8, 4\) voxels, not \(9, 8, 4\)"):
        network.encode(torch.zeros(1, 2, 9, 8, 4))
    with pytest.raises(ValueError, match="takes patches"):
        network(volume, locations, None)
    with pytest.raises(ValueError, match="takes no patches"):
        OSSNet(tiny("O-Net"))(volume, locations, patches)


def test_normalised_coordinates() -> None:
    shape = (256, 256, 155)
    corners = torch.tensor([[0.0, 0.0, 0.0], [255.0, 255.0, 154.0]])
    assert normalise_locations(corners, shape).tolist() == [[-1, -1, -1], [1, 1, 1]]

    spec = tiny("A")
    plain, scaled = OSSNet(spec).eval(), OSSNet(replace(spec, normalise_coordinates=True)).eval()
    scaled.load_state_dict(plain.state_dict())
    volume, locations, patches = inputs(spec)
    with torch.no_grad():
        latent = plain.encode(volume).latent
        torch.testing.assert_close(
            scaled.decode(locations, patches, latent),
            plain.decode(normalise_locations(locations, spec.shape), patches, latent),
        )


def test_coordinates_stay_exact_under_autocast() -> None:
    """bfloat16 has no 257: neighbours far from the origin must still differ."""
    network = wake(OSSNet(tiny("O-Net"))).eval()
    volume, _, _ = inputs(network.spec, volumes=1)
    locations = torch.tensor([[[400.0, 0, 0], [401.0, 0, 0]]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latent = network.encode(volume).latent
        seen = network.decoder.blocks[0]
        hidden = {}
        seen.cnb_1.register_forward_hook(lambda _m, args, _out: hidden.update(x=args[0]))
        network.decode(locations, None, latent)
    step = (hidden["x"][0, 1] - hidden["x"][0, 0]).float()
    torch.testing.assert_close(step, seen.linear_layer_1.weight[:, 0].detach(), rtol=1e-2, atol=1e-4)


def test_decoder_can_be_compiled(tmp_path: Path) -> None:
    """In a process of its own: shape checks cannot be traced."""
    script = tmp_path / "compile.py"
    script.write_text(
        """
import torch
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import spec_for
from dataclasses import replace

torch.manual_seed(0)
spec = replace(spec_for("D", 1, 1, (16, 16, 16), blocks=(4, 4)), width=8, decoder_blocks=2)
network = OSSNet(spec)
# No code is generated: what matters is that the graph has no break.
decode = torch.compile(network.decoder, fullgraph=True, backend="eager")
locations, latent = torch.rand(2, 5, 3), torch.randn(2, spec.latent_rows, spec.latent_length)
patches = torch.randn(2, 5, spec.patch_channels, 7, 7, 7)
decode(locations, patches, latent).sum().backward()
network.eval()
plain = network.decode(locations, patches, latent)
torch.testing.assert_close(decode(locations, patches, latent), plain, rtol=1e-4, atol=1e-5)
print("compiled")
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "JAXTYPING_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
