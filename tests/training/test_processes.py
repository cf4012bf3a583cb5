"""Two processes on the CPU learn what one learns, and end together. Each training is a process tree of its own."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from tests.training.conftest import SMALL

from ossnet.errors import SettingsError
from ossnet.training.processes import waits_for, with_processes
from ossnet.training.settings import make_settings
from ossnet.training.train import train as ossnet_train

QUICK = [*SMALL, "runtime.accelerator=cpu", "validation.dense=false", "validation.picture=false"]
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "two_processes.json"


def environment() -> dict[str, str]:
    """Without what would make the child think that it is one of several processes already."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    kept = {
        k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("TORCHELASTIC", "SLURM"))
    }
    return {**kept, "OMP_NUM_THREADS": "1"}


def arguments(data: Path, out: Path, changes: list[str], *more: str) -> list[str]:
    settings = [part for change in changes for part in ("--set", change)]
    return [
        "-m",
        "ossnet",
        "train",
        "--data",
        str(data),
        "--out",
        str(out),
        "--variant",
        "C",
        *settings,
        *more,
    ]


def run(command: list[str], seconds: int = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
    )


def losses(out: Path) -> np.ndarray:
    return np.loadtxt(out / "losses.csv", delimiter=",", skiprows=1)[:, 1]


def train(data: Path, out: Path, changes: list[str], *more: str) -> np.ndarray:
    done = run([sys.executable, *arguments(data, out, changes, *more)])
    assert done.returncode == 0, done.stderr
    return losses(out)


def test_two_processes_learn_what_one_learns(balls: Path, tmp_path: Path) -> None:
    changes = [*QUICK, "schedule.epochs=2"]
    one = losses(ossnet_train(balls, tmp_path / "one", make_settings("C", None, None, changes)))
    done = run([sys.executable, *arguments(balls, tmp_path / "two", changes, "--devices", "2")])
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), one, atol=1e-4)
    assert done.stderr.count("finished") == 1  # only one of them speaks
    for noise in ("GLOBAL_RANK", "distributed", "Lightning", "warning"):
        assert noise not in done.stderr
    assert not (tmp_path / "two" / "cache").exists()


@pytest.mark.slow
def test_the_same_loss_over_fifty_steps(balls: Path, tmp_path: Path) -> None:
    changes = [*QUICK, "schedule.epochs=25", "validation.every=25", "sampling.locations=256"]
    one = train(balls, tmp_path / "one", changes)
    two = train(balls, tmp_path / "two", changes, "--devices", "2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = run([*torchrun, *arguments(balls, tmp_path / "elastic", changes)])
    assert done.returncode == 0, done.stderr
    elastic = losses(tmp_path / "elastic")
    gaps = {"--devices 2": np.abs(two - one), "torchrun": np.abs(elastic - one)}
    result = {
        "what": "variant C on the tiny data set of the tests: two CPU processes (gloo) against one, batch of 4",
        "command": "pytest -m slow tests/training/test_processes.py",
        "settings": changes,
        "steps": len(one),
        "loss, one process": [round(float(v), 6) for v in one],
        "largest difference": {k: float(v.max()) for k, v in gaps.items()},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("ossnet", "torch")}},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    assert len(one) == 50
    assert max(v.max() for v in gaps.values()) < 1e-4


def test_an_error_is_told_once(balls: Path, tmp_path: Path) -> None:
    """Both processes meet the file that cannot be read."""
    broken = tmp_path / "data"
    for file in balls.rglob("*.*"):
        target = broken / file.relative_to(balls)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    scan = broken / "imagesTr" / "ball_03_0000.nii.gz"
    content = scan.read_bytes()
    scan.unlink()
    scan.write_bytes(content[: len(content) // 2])
    done = run([sys.executable, *arguments(broken, tmp_path / "out", QUICK, "--devices", "2")])
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert scan.name in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_interrupted_together(balls: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group; one state is written, and the run goes on from it."""
    changes = [*QUICK, "schedule.epochs=400", "validation.every=1"]
    command = [sys.executable, *arguments(balls, tmp_path / "out", changes, "--devices", "2")]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        started = time.monotonic()
        while not (tmp_path / "out" / "log.csv").exists() and time.monotonic() - started < 120:
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert messages.count("interrupted; ") == 1
    assert "Traceback" not in messages
    steps = len(losses(tmp_path / "out"))
    assert steps >= 2
    assert not (tmp_path / "out" / "cache").exists()


def external(**values: str) -> Mapping[str, str]:
    return values


def test_numbers_of_processes_come_from_who_started_them() -> None:
    settings = make_settings("C", None, None, ["schedule.batch_size=8"])

    def runtime(**values: str) -> tuple[int, int]:
        found = with_processes(settings, external(**values)).runtime
        return found.devices, found.nodes

    assert runtime() == (1, 1)
    torchrun = {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
    assert runtime(**torchrun) == (2, 2)
    assert runtime(SLURM_NTASKS="8", SLURM_NNODES="2", SLURM_JOB_NAME="train") == (4, 2)
    assert runtime(SLURM_NTASKS="8", SLURM_NNODES="2", SLURM_JOB_NAME="bash") == (1, 1)
    four = make_settings("C", None, None, ["runtime.devices=4"])
    with pytest.raises(SettingsError, match="4 are wanted"):
        with_processes(four, torchrun)
    assert waits_for(with_processes(four, {}), torchrun) is None
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    two = with_processes(make_settings(), slurm)
    assert "srun" in str(waits_for(two, slurm))
    assert waits_for(two, {**slurm, "SLURM_PROCID": "1"}) is None
    # A recipe of one crop a step: one for each process.
    assert with_processes(make_settings(changes=["runtime.devices=3"]), {}).schedule.batch_size == 3
    with pytest.raises(SettingsError, match="cannot be shared"):
        with_processes(make_settings("C", None, None, ["runtime.devices=3"]), {})
