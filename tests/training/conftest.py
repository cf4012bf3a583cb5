"""A data set small enough to train on in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest

from ossnet.volume import LabelMap, Volume


@pytest.fixture(scope="session")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten noisy scans of a bright ball with a core, nnU-Net layout, two structures, 2 × 1 × 1 mm."""
    root = tmp_path_factory.mktemp("data") / "Dataset001_Balls"
    axes = np.meshgrid(np.arange(12) * 2.0, np.arange(22.0), np.arange(18.0), indexing="ij")
    for index in range(10):
        rng = np.random.default_rng(index)
        centre = rng.uniform([8, 8, 7], [14, 14, 11])
        distance = np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)))
        labels = (distance < 6.5).astype(np.uint8) + (distance < 3.5)
        image = (100 * labels + rng.normal(0, 10, labels.shape)).astype(np.int16)
        affine = np.diag([2.0, 1.0, 1.0, 1.0])
        Volume(image[None], affine).save(root / "imagesTr" / f"ball_{index:02d}_0000.nii.gz")
        LabelMap(labels.astype(np.uint8), affine).save(root / "labelsTr" / f"ball_{index:02d}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "shell": 1, "core": 2, "ball": [1, 2]},
        "numTraining": 10,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


SMALL = [
    "data.shape=32,32,32",
    "network.blocks=4,8",
    "network.width=16",
    "sampling.locations=32",
    "schedule.epochs=3",
    "schedule.batch_size=4",
    "validation.every=1",
    "validation.locations=200",
    "validation.dense_cases=1",
    "validation.picture=false",
    "runtime.threads=1",
    "runtime.tensorboard=false",
]
"""A variant of the paper that trains in a second."""
