"""Probabilities that mean what they say: one temperature a model, fitted on the cases left out.

A network that fits its training cases ever better is ever surer, of what it has not seen too. Logits divided by one
number, which changes no label, cure most of it (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).
"""

import os
import zlib
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ossnet.data.balanced import balanced_voxels
from ossnet.data.cache import CachedCase
from ossnet.field.field import Field
from ossnet.field.model import Model

Answers = tuple[Float[Tensor, "N *K"], Integer[Tensor, " N"]]
"""Logits, and what is right."""

_VOXELS, _LOGITS = 8192, 20_000_000
"""Asked of a case, half of them near structures; and logits of all cases together, which are held at once."""

_MOST = 3.0
"""Temperatures from the inverse of this on: where all answers are right, none is sure enough."""


def asked(field: Field, case: CachedCase, cases: int = 1) -> Answers:
    """Logits for voxels of a case, the same ones each time, and the classes that are right there.

    Args:
        cases: How many there are.
    """
    rng = np.random.default_rng(zlib.crc32(os.fsencode(case.name)))
    count = min(_VOXELS, _LOGITS // (max(field.model.classes, 2) * cases))
    voxels, _ = balanced_voxels(rng, case.labels, field.model.classes, count)
    classes = case.reference()[tuple(voxels.T)].astype(np.int64)
    return torch.from_numpy(field.logits(voxels)), torch.from_numpy(classes)


def temperature(logits: Float[Tensor, "N *K"], classes: Integer[Tensor, " N"]) -> float:
    """The number to divide logits by that makes what is right most likely, all locations together.

    Args:
        logits: (N,) of one structure, (N, K) of K classes.
        classes: What is right: 0 or 1, or 0 … K-1.
    """
    logits = logits.double()
    if logits.ndim == 1:
        logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
    right = logits.gather(1, classes[:, None])[:, 0]
    # The likelihood is concave in the inverse of the temperature: its slope has one zero.
    low, high = -np.log(_MOST), np.log(_MOST)
    for _ in range(40):
        middle = (low + high) / 2
        mean = ((logits * np.exp(middle)).softmax(dim=1) * logits).sum(dim=1)
        if float((right - mean).mean()) > 0:
            low = middle
        else:
            high = middle
    return round(float(np.exp(-low)), 3)


def calibrate(model: Model, answers: Iterable[Answers]) -> None:
    """Fit the model's temperature (`Model.temperature`) to answers for cases that it was not trained on."""
    logits, classes = (torch.cat(parts) for parts in zip(*answers, strict=True))
    model.metadata["temperature"] = temperature(logits, classes)
