"""What a family of networks must say so that the training loop can train it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ossnet.data.augment import Augmentation, apply_intensity, draw
from ossnet.data.cache import CachedCase
from ossnet.data.preparation import Preparation, as_float
from ossnet.training.optimiser import Muon, paper_optimiser, parameter_groups
from ossnet.training.settings import Settings
from ossnet.volume import flipped


class Recipe(ABC):
    """How one family of networks is trained: what an example is and what is minimised.

    An example is drawn from its own generator and nothing else, so that a resumed training draws the same ones.
    """

    def __init__(self, network: nn.Module, preparation: Preparation, settings: Settings) -> None:
        self.network, self.preparation, self.settings = network, preparation, settings

    @abstractmethod
    def example(self, case: CachedCase, rng: np.random.Generator, passes: float = 0.0) -> Any:
        """Draw one example on the CPU; called ahead in other threads.

        Args:
            passes: How often every case was drawn before this epoch, or what `batches` counts of very few.
        """

    def drawn(self, case: CachedCase, rng: np.random.Generator) -> Augmentation:
        """Mirroring, brightness and noise of an example, as the settings ask for."""
        chosen = self.settings.augmentation
        return draw(
            rng, len(case.image), chosen.probability, chosen.flip_axes, chosen.brightness, chosen.noise
        )

    @abstractmethod
    def batch(self, examples: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """Examples together, on the device, as `loss` wants them."""

    @abstractmethod
    def loss(self, forward: Callable[..., Any], batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """The loss of a batch, differentiable.

        Args:
            forward: The network as the devices run it.
        """

    @property
    def capturable(self) -> bool:
        """Whether `loss` only ever computes the same on tensors of the same shapes: see `training.gradients`."""
        return False

    def optimisers(self) -> list[Optimizer]:
        """One or more optimisers that together hold every parameter once."""
        chosen = self.settings.optimiser
        if chosen.name == "lookahead_radam":
            return [
                paper_optimiser(
                    self.network,
                    chosen.lr,
                    chosen.pade_lr,
                    chosen.lookahead_k,
                    chosen.lookahead_alpha,
                    chosen.weight_decay,
                )
            ]
        turned = directions(self.network) if chosen.name == "muon" else []
        rest = parameter_groups(self.network, chosen.lr, chosen.pade_lr, without=turned)
        adam = AdamW(rest, chosen.lr, betas=(0.9, 0.99), weight_decay=chosen.weight_decay)
        return [Muon(turned, lr=chosen.muon_lr), adam] if turned else [adam]

    @property
    def repeats(self) -> int:
        """Examples drawn from each case in an epoch."""
        return 1


def directions(network: nn.Module) -> list[Tensor]:
    """Weights of convolutions, which Muon turns.

    A network that has convolutions without a normalisation or gain behind them says which it may have: `directions`.
    """
    own = getattr(network, "directions", None)
    if own is not None:
        return [p for p in own() if p.requires_grad]
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return [m.weight for m in network.modules() if isinstance(m, kinds) and m.weight.requires_grad]


def augmented(case: CachedCase, plan: Augmentation, preparation: Preparation, device: torch.device) -> Tensor:
    """(C, *S) float32: the scan normalised, mirrored, changed in brightness, with noise, then fitted (SPEC §1)."""
    image = as_float(flipped(case.image, plan.flips), device)
    image = preparation.normalise_(image, case.statistics)
    return case.fit.volume(apply_intensity(image, plan, case.statistics.top))
