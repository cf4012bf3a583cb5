"""Answers beyond the scan, and answers that are none."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import tiny

from ossnet.errors import SettingsError
from ossnet.networks.multiscale import MultiscaleNetwork
from ossnet.volume import Volume


@pytest.mark.parametrize("classes", [1, 3])
def test_beyond_the_scan_is_background_whatever_the_temperature(classes: int) -> None:
    scan, model = tiny.scan((14, 12, 10)), tiny.model("multiscale", classes)
    affine = scan.affine.copy()
    affine[:3, 3] = scan.to_world(np.array([[-4.0, -4.0, -4.0]]))[0]
    around = Volume(np.zeros((1, 22, 20, 18), np.uint8), affine)
    calibrated = replace(model, metadata={**model.metadata, "temperature": 7.0})
    found = calibrated.field(scan).probability_map(like=around).data
    inside = np.zeros(found.shape[1:], bool)
    inside[4:-4, 4:-4, 4:-4] = True
    assert (found[-1][~inside] == 0).all()
    assert (found[-1][inside] > 0).all()


def test_answers_that_are_no_numbers_are_refused() -> None:
    model = tiny.model("multiscale")
    assert isinstance(model.network, MultiscaleNetwork)
    with torch.no_grad():
        model.network.decoder.last.bias.fill_(float("nan"))
    field = model.field(tiny.scan())
    for call in (field.segment, lambda: field.segment(strategy="dense"), field.probability_map):
        with pytest.raises(SettingsError, match="not-a-number"):
            call()
