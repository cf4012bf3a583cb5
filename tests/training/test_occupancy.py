"""What a step of the paper's variants is given."""

import numpy as np
import torch

from ossnet.data.cache import CachedCase
from ossnet.data.patches import PatchSource
from ossnet.data.preparation import Fit, Preparation, reduce_by_two
from ossnet.networks.ossnet import OSSNet
from ossnet.networks.variants import spec_for
from ossnet.training.recipes.base import augmented
from ossnet.training.recipes.occupancy import OccupancyRecipe
from ossnet.training.settings import make_settings
from ossnet.volume import Orientation, Shape

SHAPE: Shape = (16, 16, 16)


def case(name: str, seed: int) -> CachedCase:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 1000, (2, 15, 14, 16), dtype=np.int16)
    preparation = Preparation(fit="pad", shape=SHAPE)
    return CachedCase(
        name,
        image,
        (image[0] > 700).astype(np.uint8),
        preparation.statistics(image),
        np.eye(4),
        (1.0, 1.0, 1.0),
        Fit.pad((15, 14, 16), SHAPE),
        Orientation(),
    )


def test_volumes_and_patches_of_a_batch_are_those_of_its_scans() -> None:
    settings = make_settings("B", None, None, ["sampling.locations=20"])
    preparation = Preparation(fit="pad", shape=SHAPE)
    network = OSSNet(spec_for("B", 2, 1, SHAPE, blocks=(4,)))
    recipe = OccupancyRecipe(network, preparation, settings)
    cpu = torch.device("cpu")
    examples = [recipe.example(case(f"c{i}", i), np.random.default_rng(i)) for i in range(3)]
    before = [e.case.image.copy() for e in examples]
    volumes, patches = recipe._inputs(examples, cpu)
    assert patches is not None
    # As the lean patch encoder takes them without a copy.
    assert patches.permute(0, 1, 3, 4, 5, 2).is_contiguous()
    for place, example in enumerate(examples):
        image = augmented(example.case, example.plan, preparation, cpu)
        torch.testing.assert_close(volumes[place], reduce_by_two(image))
        alone = PatchSource(image, "small+large")(example.locations)
        assert alone is not None
        assert torch.equal(patches[place], alone)
        # Cases are used again: what a step does to a scan must not reach the cache.
        assert np.array_equal(example.case.image, before[place])
