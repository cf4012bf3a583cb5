"""Which examples come in which order, drawn ahead in threads.

Everything random is drawn from (seed, epoch, place in the epoch), so that a training that goes on after it was stopped
sees what it would have seen.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from ossnet.data.cache import CachedCase
from ossnet.training.recipes.base import Recipe
from ossnet.training.settings import Settings

_FEW = 32
"""Passes are counted over so many examples at least, so that augmentation of very few does not grow before anything is
learnt."""


class Batches:
    """The batches of all epochs, of which each process takes its share."""

    def __init__(
        self, recipe: Recipe, cases: Sequence[CachedCase], settings: Settings, fabric: Fabric
    ) -> None:
        self._recipe, self._cases, self._settings, self._fabric = recipe, cases, settings, fabric
        self.examples = len(cases) * recipe.repeats
        """In a pass through all cases."""

    def of_epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Batches of (place in the epoch, case) for this process; an incomplete last batch is dropped."""
        schedule, count = self._settings.schedule, len(self._cases)
        order = np.random.default_rng([self._settings.seed, epoch, 0])
        steps = schedule.steps_per_epoch
        # Fewer cases than a batch holds: they come more than once, each time with another draw.
        wanted = max(self.examples if steps is None else steps * schedule.batch_size, schedule.batch_size)
        cases = np.concatenate([order.permutation(count) for _ in range(-(-wanted // count))])
        places = list(enumerate(cases[:wanted].tolist()))
        size, rank, world = schedule.batch_size, self._fabric.global_rank, self._fabric.world_size
        return [places[i : i + size][rank::world] for i in range(0, wanted - size + 1, size)]

    def pool(self) -> ThreadPoolExecutor:
        """Threads that draw examples."""
        return ThreadPoolExecutor(max(self._workers, 1), initializer=_compute_alone)

    def drawn(self, pool: ThreadPoolExecutor, epoch: int, position: int) -> Iterator[list[Any]]:
        """Examples of one batch after the other, in order whatever the number of threads.

        They run on into the epochs to come: an epoch of few cases is over before it is worth to wait for its first.

        Args:
            epoch, position: The first batch is number `position` of this epoch.
        """
        upcoming = self._begun(pool, epoch, position)
        # One batch for the next step, and enough to keep every thread at work meanwhile.
        share = max(self._settings.schedule.batch_size // self._fabric.world_size, 1)
        waiting = deque(islice(upcoming, 1 + math.ceil(self._workers / share)))
        while waiting:
            ready = [future.result() for future in waiting.popleft()]
            waiting.extend(islice(upcoming, 1))
            yield ready

    def _begun(self, pool: ThreadPoolExecutor, epoch: int, position: int) -> Iterator[list[Future[Any]]]:
        schedule = self._settings.schedule
        while epoch < schedule.epochs or schedule.minutes is not None:
            batches = self.of_epoch(epoch)
            passes = epoch * len(batches) * schedule.batch_size / max(self.examples, _FEW)
            for batch in batches[position:]:
                yield [pool.submit(self._draw, epoch, passes, *item) for item in batch]
            epoch, position = epoch + 1, 0

    def _draw(self, epoch: int, passes: float, place: int, case: int) -> Any:
        rng = np.random.default_rng([self._settings.seed, epoch, 1, place])
        return self._recipe.example(self._cases[case], rng, passes)

    @property
    def _workers(self) -> int:
        """Threads: a GPU takes the examples of many more than a CPU that trains as well."""
        chosen = self._settings.runtime.workers
        if chosen is not None:
            return chosen
        if self._fabric.device.type == "cpu":
            return 2
        share = (os.cpu_count() or 1) // self._settings.runtime.devices
        return min(max(share - 1, 2), 8)


def _compute_alone() -> None:
    """Keep what this thread computes to one core.

    A thread that prepares examples would otherwise start an OpenMP team of its own. With more threads in teams than
    there are cores, OpenMP puts those of the network's team to sleep at every barrier too: on two cores a step then
    took 1.4 times as long, as long as on one.
    """
    torch.set_num_threads(1)
