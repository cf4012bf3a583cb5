"""Kill −9 at random moments of a training and of the segmentation of a folder: does `--resume` always go on?

    python benchmarks/kill.py --data DATA --out WORK [--kills 20] [--segment-kills 5] [--seed 0]

Everything goes through the command line, each command a process of its own. Trainings of a small variant C
are killed again and again at random moments (while they start, in and between steps, while they validate, while they
write), and resumed each time; what they end with is compared bit for bit with a training that nobody disturbed. Then
a folder of scans is segmented in the same way. Writes `results/kill.json`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from provenance import command, commit

RESULT = Path(__file__).parent / "results" / "kill.json"
SETTINGS = (
    "data.shape=32,32,32",
    "network.blocks=4,8",
    "network.width=16",
    "sampling.locations=64",
    "schedule.epochs=20",
    "schedule.batch_size=4",
    "optimiser.ema=0.9",
    "validation.every=2",
    "validation.locations=500",
    "validation.picture=false",
    "runtime.threads=1",
    "runtime.accelerator=cpu",
    "runtime.tensorboard=false",
    # A state every third of a second: kills meet it half written.
    "runtime.checkpoint_seconds=0.3",
)


TRAINING_BEGINS = "parameters"
SEGMENTING_BEGINS = "locations,"
STARTING_UP = 0.25
"""Part of the kills that comes before the work has begun."""


@dataclass(frozen=True)
class Kill:
    """One disturbance.

    Attributes:
        moment: When, in words.
        done: Training steps, or finished scans, that were on the disk then.
        outcome: What the next command found.
    """

    moment: str
    done: int
    outcome: str


class Command:
    """The command line in a process of its own, watched for the line that says that the work begins."""

    def __init__(self, marker: str, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.started, self.begun = time.monotonic(), threading.Event()
        self.messages: list[str] = []
        command = [sys.executable, "-m", "ossnet", *arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        self.reader = threading.Thread(target=self._read, args=(marker,))
        self.reader.start()

    def _read(self, marker: str) -> None:
        if self.process.stderr is None:
            return
        with self.process.stderr as lines:
            for line in lines:
                self.messages.append(line)
                if marker in line and not self.begun.is_set():
                    self.work_began = time.monotonic()
                    self.begun.set()
        self.begun.set()

    def finish(self) -> tuple[float, float]:
        """Wait for success; seconds of starting up, and of work."""
        self.process.wait()
        self.reader.join()
        if self.process.returncode:
            raise SystemExit(f"exit code {self.process.returncode}:\n{''.join(self.messages)}")
        began = getattr(self, "work_began", self.started)
        return began - self.started, time.monotonic() - began

    def kill(self, seconds: float, *, after_beginning: bool) -> bool:
        """Kill −9 some seconds after the start, or after the work began; False when it was done before."""
        if after_beginning:
            self.begun.wait()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.reader.join()
            return True
        self.finish()
        return False


def draw(rng: random.Random, seconds: tuple[float, float]) -> tuple[float, bool, str]:
    """A random moment: seconds, whether from the beginning of the work, and in words."""
    working = rng.random() > STARTING_UP
    after = rng.uniform(0.05, 0.95) * seconds[working]
    return after, working, f"{after:.2f} s after the {'work began' if working else 'start'}"


def steps_done(run: Path) -> int:
    """Steps of the last state, as its log says."""
    log = run / "losses.csv"
    return max(len(log.read_text().splitlines()) - 1, 0) if log.exists() else 0


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    return sha256(file.read_bytes()).hexdigest()


COMPARED = ("last/weights.safetensors", "model/weights.safetensors", "losses.csv", "validation.csv")


def kill_training(
    data: Path, work: Path, kills: int, rng: random.Random, settings: Sequence[str] = SETTINGS
) -> dict[str, Any]:
    """Disturb trainings, each until it is finished, and compare what they end with to an undisturbed one."""
    changes = [part for setting in settings for part in ("--set", setting)]
    common = ["train", "--data", str(data), "--variant", "C", *changes]
    alone, disturbed = work / "alone", work / "disturbed"
    seconds = Command(TRAINING_BEGINS, *common, "--out", str(alone)).finish()
    wanted = {name: checksum(alone / name) for name in COMPARED}
    moments: list[Kill] = []
    finished: list[dict[str, bool]] = []
    while len(moments) < kills:
        shutil.rmtree(disturbed, ignore_errors=True)
        before, more = 0, True
        while more:
            # A run that was killed before it wrote anything has nothing to resume.
            resume = ["--resume"] if (disturbed / "settings.json").exists() else []
            command = Command(TRAINING_BEGINS, *common, "--out", str(disturbed), *resume)
            if len(moments) == kills:
                command.finish()
                break
            after, working, words = draw(rng, seconds)
            more = command.kill(after, after_beginning=working)
            if more:
                steps = steps_done(disturbed)
                outcome = (
                    "LOST STEPS" if steps < before else f"went on from step {before}" if before else "started"
                )
                moments.append(Kill(words, steps, outcome))
                print(moments[-1], flush=True)
                before = steps
        left = [str(p.relative_to(disturbed)) for p in disturbed.rglob(".writing-*")]
        equal = {name: checksum(disturbed / name) == found for name, found in wanted.items()}
        finished.append({**equal, "nothing half-written": not left})
        print(finished[-1], flush=True)
    return {
        "seconds of starting up and of work, undisturbed": [round(s, 1) for s in seconds],
        "steps": steps_done(alone),
        "kills": [asdict(moment) for moment in moments],
        "trainings finished after their kills, equal bit for bit": finished,
    }


def kill_segmenting(data: Path, run: Path, work: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Disturb the segmentation of a folder."""
    images = work / "images"
    images.mkdir(parents=True, exist_ok=True)
    for file in (data / "imagesTr").glob("*_0000.nii.gz"):
        for copy in "abc":
            shutil.copy(file, images / f"{copy}_{file.name}")
    common = ["segment", str(images), "--model", str(run), "--strategy", "dense"]
    alone, disturbed = work / "segmented", work / "segmented_disturbed"
    seconds = Command(SEGMENTING_BEGINS, *common, "--out", str(alone)).finish()
    wanted = {file.name: checksum(file) for file in alone.glob("*.nii.gz")}
    moments: list[Kill] = []
    while len(moments) < kills:
        shutil.rmtree(disturbed, ignore_errors=True)
        after = rng.uniform(0, seconds[1])
        command = Command(SEGMENTING_BEGINS, *common, "--out", str(disturbed))
        if not command.kill(after, after_beginning=True):
            continue
        done = {file.name: (checksum(file), file.stat().st_mtime_ns) for file in disturbed.glob("*.nii.gz")}
        whole = all(wanted[name] == found for name, (found, _) in done.items())
        Command(SEGMENTING_BEGINS, *common, "--out", str(disturbed)).finish()
        now = {file.name: (checksum(file), file.stat().st_mtime_ns) for file in disturbed.glob("*.nii.gz")}
        kept = all(now[name] == facts for name, facts in done.items())
        equal = {name: found for name, (found, _) in now.items()} == wanted
        clean = not list(disturbed.glob(".writing-*"))
        outcome = (
            "resumed: finished files untouched, all equal"
            if whole and kept and equal and clean
            else "DIFFERENT"
        )
        moments.append(Kill(f"{after:.2f} s after the first scan", len(done), outcome))
        print(moments[-1], flush=True)
    return {
        "seconds of starting up and of work, undisturbed": [round(s, 1) for s in seconds],
        "scans": len(wanted),
        "kills": [asdict(moment) for moment in moments],
    }


def measure(data: Path, work: Path, kills: int, segment_kills: int, seed: int) -> dict[str, Any]:
    """Everything, as `results/kill.json` holds it."""
    rng, state = random.Random(seed), commit()
    work.mkdir(parents=True, exist_ok=True)
    training = kill_training(data, work, kills, rng)
    segmenting = kill_segmenting(data, work / "alone", work, segment_kills, rng)
    return {
        "what": "kill -9 at random moments; variant C on ten scans of 12 x 22 x 18 voxels, through the command line",
        "command": command(),
        "commit": state,
        "versions": {name: version(name) for name in ("ossnet", "torch", "numpy", "safetensors")},
        "settings": SETTINGS,
        "training": training,
        "segmenting": segmenting,
    }


def main() -> None:
    """Arguments in, results file out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a small data set in nnU-Net layout")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder to work in")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--segment-kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    result = measure(chosen.data, chosen.out, chosen.kills, chosen.segment_kills, chosen.seed)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT)


if __name__ == "__main__":
    main()
