"""The engine's answers are the network's, whatever else is asked with them."""

import pytest
import torch

from ossnet.data.patches import PatchSource
from ossnet.data.preparation import reduce_by_two
from ossnet.errors import SettingsError
from ossnet.field.answer import Answer
from ossnet.field.engine import prepare
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import spec_for

SHAPE = (32, 32, 16)


def trained(variant: str, channels: int = 2, classes: int = 1) -> OSSNet:
    """A network whose weights and running statistics are all away from their initial values."""
    torch.manual_seed(0)
    network = OSSNet(spec_for(variant, channels, classes, SHAPE, blocks=(4, 8)))
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point() and ".weight_" not in name:
                value.add_(0.05 * torch.randn_like(value))
    return network.eval()


def direct(network: OSSNet, image: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
    """What the module says, with everything in one batch."""
    with torch.no_grad():
        latent = network.encode(reduce_by_two(image)[None]).latent
        patches = PatchSource(image, network.spec.patches)(locations)
        return network.decode(locations[None].float(), None if patches is None else patches[None], latent)[0]


def some_locations(count: int) -> torch.Tensor:
    return torch.stack([torch.randint(0, n, (count,)) for n in SHAPE], 1)


@pytest.mark.parametrize("variant", ["O-Net", "A", "B", "C", "D"])
@pytest.mark.parametrize("classes", [1, 3])
def test_answers_are_the_networks(variant: str, classes: int) -> None:
    network, image = trained(variant, classes=classes), torch.randn(2, *SHAPE)
    locations = some_locations(300)
    answer = prepare(network, image, chunk=64)
    assert isinstance(answer, Answer)
    torch.testing.assert_close(answer(locations), direct(network, image, locations), rtol=1e-4, atol=1e-4)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(SettingsError, match="Linear"):
        prepare(torch.nn.Linear(1, 1), torch.zeros(1, 4, 4, 4))


def test_an_image_of_another_shape_is_refused() -> None:
    with pytest.raises(SettingsError, match="image"):
        prepare(trained("C"), torch.zeros(2, 32, 32, 32))
