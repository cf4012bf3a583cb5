"""What people look at while a network trains: pictures, and TensorBoard events."""

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ossnet.data.cache import CachedCase
from ossnet.field.model import Model
from ossnet.files.atomic import write_bytes
from ossnet.reports.figures import overlay
from ossnet.volume import LabelMap


def illustrate(model: Model, case: CachedCase, title: str) -> bytes:
    """A PNG: slices of a case with the outlines of the prediction and of the reference."""
    found = model.field(case.volume(), device=next(model.network.parameters()).device).segment()
    reference = (case.labels > 0).astype("uint8") if model.classes == 1 else case.labels
    return overlay(
        case.volume(), found, LabelMap(reference, case.affine), title=f"{_written(case.name)}, {title}"
    )


class Pictures:
    """Pictures of a case, drawn while a network trains. What fails there ends the pictures and not the training.

    Args:
        folder: Where they are written; None draws none.
        most_seconds: A picture that takes longer is the last one.
    """

    def __init__(self, folder: Path | None, most_seconds: float = math.inf) -> None:
        self._folder, self._most_seconds = folder, most_seconds

    def draw(self, model: Model, case: CachedCase, step: int) -> None:
        """Write `step_0000100.png`."""
        if self._folder is None:
            return
        started = time.monotonic()
        file = self._folder / f"step_{step:07d}.png"
        try:
            write_bytes(file, illustrate(model, case, f"step {step}"))
        except Exception as error:  # of drawing, memory or the disk: none is worth a training
            self._folder = None
            warnings.warn(f"no more pictures: {error}", stacklevel=3)
        if time.monotonic() - started > self._most_seconds:
            self._folder = None


def _written(name: str) -> str:
    """A name as it can be drawn, which may be no text."""
    return name.encode(errors="replace").decode()


class Events:
    """TensorBoard events; silent where tensorboard is not installed or no folder is given.

    Args:
        start: Step at which a resumed training goes on; later events of the stopped one are hidden.
    """

    def __init__(self, folder: Path | None, start: int) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder), purge_step=start or None)

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Write numbers; names without a group are validation scores."""
        if self._writer is None:
            return
        with self._spared():
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._writer.add_scalar(name if "/" in name else f"validation/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with self._spared():
                self._writer.close()

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """A disk that is full ends the log and not the training."""
        try:
            yield
        except OSError as error:
            self._writer = None
            warnings.warn(f"no more TensorBoard events: {error.strerror or error}", stacklevel=4)
