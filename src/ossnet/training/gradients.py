"""The loss of a batch and the gradients of the weights, on a GPU without launching every kernel anew.

A step of the default network is two thousand kernels of a few microseconds: launched one by one from Python they keep
a GPU at work for a sixth of the time (`benchmarks/gpu.py`). Captured once as a CUDA graph they are launched together.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ossnet.training.recipes.base import Recipe

_FIRST = 3
"""Steps before the capture: libraries set themselves up, and choose, on first use."""


class Gradients:
    """Called with the examples of a step: leaves gradients in the weights, returns the loss.

    Args:
        recipe: Where it is `capturable`, steps on one GPU are captured; whatever goes wrong then, training goes on
            without.
        forward: The network as the device runs it.

    Attributes:
        captures: Whether steps are captured.
        captured: The graph; None before, and where nothing is captured.
    """

    def __init__(self, recipe: Recipe, forward: nn.Module, fabric: Fabric) -> None:
        self.recipe, self.forward, self.fabric = recipe, forward, fabric
        self.captures = recipe.capturable and fabric.device.type == "cuda" and fabric.world_size == 1
        self._steps = 0
        self.captured: Captured | None = None

    def __call__(self, examples: Sequence[Any]) -> Tensor:
        """The loss, a scalar without a gradient; it holds until the next call."""
        batch = self.recipe.batch(examples, self.fabric.device)
        self._steps += 1
        if self.captures and self.captured is None and self._steps > _FIRST:
            try:
                self.captured = Captured(self._backward, self.recipe.network, batch)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph, launching one by one: {error}", stacklevel=2)
                self.captures = False
        if self.captured is not None and self.captured.fits(batch):
            return self.captured(batch)
        return self._backward(batch)

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.recipe.loss(self.forward, batch)
        self.fabric.backward(loss)
        return loss.detach()


class Captured:
    """Loss and gradients as a graph that reads from and writes to the same memory in every step."""

    def __init__(
        self, backward: Callable[[dict[str, Tensor]], Tensor], network: nn.Module, batch: dict[str, Tensor]
    ) -> None:
        self._batch = {key: value.clone() for key, value in batch.items()}
        # On a stream of its own, as the capture will be: what autograd sets up belongs to a stream.
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                backward(self._batch)
                network.zero_grad(set_to_none=True)
            current.wait_stream(side)
            with torch.cuda.graph(self._graph, stream=side):
                self._loss = backward(self._batch)
        except RuntimeError:
            network.zero_grad(set_to_none=True)
            raise
        self._gradients = [(p, p.grad) for p in network.parameters() if p.grad is not None]

    def fits(self, batch: dict[str, Tensor]) -> bool:
        """Whether a batch has the captured shapes."""
        return {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in self._batch.items()}

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        for key, value in batch.items():
            self._batch[key].copy_(value)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss
