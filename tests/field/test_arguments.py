"""What is asked of a field is checked, in plain Python: without the type checks that tests install."""

import subprocess
import sys
from pathlib import Path

from tests import tiny

CASES = {
    "field.probability([17, 25, 17])": "One point is [[x, y, z]]",
    "field.probability([[1, 2, 3]], space='mm')": "Use voxel (indices) or world (mm)",
    "field.logits([[float('nan'), 1, 1]])": "some are not finite",
    "field.segment(strategy='fast')": "'fast' is unknown",
    "model.field('scan.nii.gz')": "it is a str",
    "model.forecast('scan.nii.gz')": "it is a str",
    "model.forecast(field.volume, device='foo')": "'foo' is not a device. Use auto, cpu or cuda",
    "model.forecast(field.volume, device='cuda:99')": "cuda:99 is not there. Use cpu",
    "model.forecast(field.volume, precision='fp16')": "'fp16' is unknown. Use auto, fp32 or bf16",
    "model.field(field.volume, precision='fp16')": "'fp16' is unknown. Use auto, fp32 or bf16",
    "model.field(field.volume, device='mps')": "'mps' is not one that is used. Use auto, cpu or cuda",
    "ossnet.load(['a', 'b'])": "it is a list. Give folders one by one",
    "field.segment(region=(0, 0, 0, 5, 5, 5))": "Write ((x0, y0, z0), (x1, y1, z1))",
    "field.segment(region=((0, 0, 0), (1, 1)))": "Write ((x0, y0, z0), (x1, y1, z1))",
    "field.mesh(1, labels='seg.nii.gz')": "it is a str. Read it: ossnet.read_labels(path)",
    "print(model, field, end='') or ossnet.load('nowhere')": "there is no such folder",
    "field.segment(region=((0, 0, 0), (9, 9, 9)), batch=0)": "batch: is 0",
    "field.segment(strategy='dense', spacings=2)": "there is no option spacings. Perhaps spacing is meant",
    "field.segment(spacing=(1, 2))": "(1, 2) is not one number an axis",
    "field.segment(spacing='fine')": "'fine' is not one number an axis",
    "model.field(field.volume, device=None)": "None is not a device",
    "ossnet.refine(len, 32)": "shape: is 32. Give three whole numbers, one an axis",
    "ossnet.refine(len, (32, 32, 32), stride=(4, 4))": "stride: is (4, 4)",
    "field.segment(stride='a')": "stride: is 'a'",
    "field.segment(shape=10)": "10 is not one number an axis",
    "field.segment(shape=(20.5, 20, 20))": "(20.5, 20, 20) has fractions of voxels",
    "field.segment(shape=(20, np.inf, 20))": "(20, inf, 20) has fractions of voxels",
    "field.segment(path=4)": "4 is not a way from coarse to fine",
    "field.segment(path=((8, 8), 1))": "((8, 8), 1) is not a way from coarse to fine",
    "ossnet.refine(len, (32, 32, 32), path=(8.5, 1))": "(8.5, 1) is not a way from coarse to fine",
    "model.forecast(field.volume, spacing=(1, 2))": "(1, 2) is not one number an axis",
    "model.forecast(field.volume, chunk=-1)": "chunk: it is -1",
    "model.field(field.volume, chunk=0)": "chunk: it is 0",
    "model.field(field.volume, chunk='big')": "chunk: it is 'big'",
    "field.segment(region=((0.5, 0, 0), (9, 9, 9)))": "has fractions of voxels. Give whole numbers",
    "ossnet.read(field.volume.source, nonfinite='Refuse')": "nonfinite: it is 'Refuse'",
    "ossnet.Volume([[[[1]]]], np.eye(4))": "its data is list. Give a numpy array of numbers",
    "ossnet.Volume(field.volume.data, np.eye(3))": "its affine is (3, 3), not 4 × 4",
    "ossnet.Volume(np.zeros((1, 0, 2, 2)), np.eye(4))": "it has no voxels (1, 0, 2, 2)",
    "ossnet.LabelMap(np.full((2, 2, 2), 1.7), np.eye(4))": "its data is float64. Give a numpy array of whole numbers",
    "field.segment(like='a.nii.gz')": "it is a str. Read it",
    "ossnet.Volume(field.volume.data[0], field.volume.affine)": "3 axes instead of 4",
    "field.mesh(faces=2)": "faces: is 2",
    "field.mesh(smooth=1.5)": "smooth: is 1.5. Give a whole number, at least 0",
    "field.mesh(min_voxels='9')": "min_voxels: is '9'",
    "field.mesh(gradient=3)": "gradient: is a int. Give a function",
    "field.mesh(1, refinment='paper')": "mesh: there is no option refinment. Perhaps refinement is meant",
    "field.mesh(1, classes=3)": "mesh: there is no option classes",
    "field.mesh(refinement='best')": "'best' is not known",
    "model.field(nan).segment(strategy='dense')": "voxels are NaN or infinite",
    "field.segment(strategy='dense', doubt=None)": "doubt: 'dense' does not use it",
    "field.segment(strategy='released', safety=1)": "safety: 'released' does not use it",
    "field.segment(reevaluate=True)": "reevaluate: 'auto' does not use it",
    "field.segment(start='paper')": "start: 'paper' is the released algorithm. Use strategy=\"paper\"",
}


def test_mistakes_are_named(tmp_path: Path) -> None:
    tiny.model("multiscale").save(tmp_path / "model")
    tiny.scan().save(tmp_path / "scan.nii.gz")
    lines = [
        "import ossnet",
        f"model = ossnet.load({str(tmp_path / 'model')!r})",
        f"field = model.field(ossnet.read({str(tmp_path / 'scan.nii.gz')!r}))",
        "assert ossnet.__version__",
        "assert field.probability([[1, 2, 3]]).shape == (1,)",
        "assert field.volume == field.volume and field.volume in {field.volume}",
        "print(field.volume)",
        "import numpy as np",
        "assert field.segment(spacing=np.float32(0.7)).shape == field.segment(spacing=0.7).shape",
        "assert model.forecast(field.volume, spacing=np.float32(1)).locations > 0",
        "assert field.segment(start='predict').evaluated == field.segment().evaluated",
        "nan = ossnet.Volume(np.full(field.volume.data.shape, np.nan), np.eye(4))",
    ]
    for call in CASES:
        lines += ["try:", f"    {call}", "except ossnet.OssnetError as error:", "    print(error)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("Volume(14 × 12 × 10 voxels of 1 × 1 × 1 mm, int16, ")
    assert len(said) == 1 + len(CASES)
    for line, part in zip(said[1:], CASES.values(), strict=True):
        assert part in line
