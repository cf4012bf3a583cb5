"""Kill −9 at random moments of a training and of the segmentation of a folder: does `--resume` always go on?

    python benchmarks/kill.py --data DATA --out WORK [--kills 20] [--segment-kills 5] [--seed 0]

Everything goes through the command line, each command a process of its own. One training of a small variant C is
killed again and again at random moments (while it starts, between steps, while it validates, while it writes), and
resumed each time; what it ends with is compared bit for bit with a training that nobody disturbed. Then a folder of
scans is segmented in the same way. Writes `results/kill.json`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Kill:
    """One disturbance.

    Attributes:
        seconds: From the start of the command to the signal.
        steps: Training steps, or finished scans, that were on the disk then.
        outcome: What the next command did.
    """

    seconds: float
    steps: int
    outcome: str


def ossnet(*arguments: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ossnet", *arguments]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> float:
    """Wait for a command that must succeed; seconds it took."""
    started = time.monotonic()
    _, messages = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}:\n{messages}")
    return time.monotonic() - started


def killed(process: subprocess.Popen[str], after: float) -> bool:
    """Kill −9 after some seconds; False when the command was done before."""
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    _, messages = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}:\n{messages}")
    return False


def steps_done(run: Path) -> int:
    """Steps of the last state, as its log says."""
    log = run / "losses.csv"
    return max(len(log.read_text().splitlines()) - 1, 0) if log.exists() else 0


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    return sha256(file.read_bytes()).hexdigest()


def same(one: Path, other: Path, names: tuple[str, ...]) -> dict[str, bool]:
    """Which files of two runs are equal bit for bit."""
    return {name: checksum(one / name) == checksum(other / name) for name in names}


def kill_training(data: Path, work: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Disturb one training, and compare it with another."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    common = ["train", "--data", str(data), "--variant", "C", *settings]
    alone, disturbed = work / "alone", work / "disturbed"
    seconds = finish(ossnet(*common, "--out", str(alone)))
    moments: list[Kill] = []
    resumed, before = False, 0
    while len(moments) < kills:
        # A resumed training has less to do each time; a moment after its end is no kill.
        after = rng.uniform(0.2, max(0.9 * seconds, 1))
        process = ossnet(*common, "--out", str(disturbed), *(["--resume"] if resumed else []))
        if not killed(process, after):
            moments_left = kills - len(moments)
            shutil.rmtree(disturbed)  # it finished: the next training takes the kills that are left
            resumed, before = False, 0
            print(f"finished undisturbed; {moments_left} kills to go", flush=True)
            continue
        steps = steps_done(disturbed)
        resumed = (disturbed / "settings.json").exists()
        outcome = f"went on from step {before}" if before else "started"
        moments.append(
            Kill(round(after, 2), steps, outcome if steps >= before else f"LOST {before - steps} steps")
        )
        print(moments[-1], flush=True)
        before = steps
    finish(ossnet(*common, "--out", str(disturbed), *(["--resume"] if resumed else [])))
    left = [str(p.relative_to(disturbed)) for p in disturbed.rglob(".writing-*")]
    return {
        "uninterrupted seconds": round(seconds, 1),
        "steps": steps_done(disturbed),
        "kills": [asdict(moment) for moment in moments],
        "equal bit for bit": same(
            alone,
            disturbed,
            ("last/weights.safetensors", "model/weights.safetensors", "losses.csv", "validation.csv"),
        ),
        "half-written files left": left,
    }


def kill_segmenting(data: Path, run: Path, work: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Disturb the segmentation of a folder."""
    images = work / "images"
    shutil.copytree(data / "imagesTr", images, dirs_exist_ok=True)
    common = ["segment", str(images), "--model", str(run), "--strategy", "dense"]
    alone, disturbed = work / "segmented", work / "segmented_disturbed"
    seconds = finish(ossnet(*common, "--out", str(alone)))
    wanted = {file.name: checksum(file) for file in alone.glob("*.nii.gz")}
    moments: list[Kill] = []
    while len(moments) < kills:
        shutil.rmtree(disturbed, ignore_errors=True)
        # The second half: a process starts before it segments.
        after = rng.uniform(0.5 * seconds, seconds)
        if not killed(ossnet(*common, "--out", str(disturbed)), after):
            continue
        done = {file.name: (checksum(file), file.stat().st_mtime_ns) for file in disturbed.glob("*.nii.gz")}
        whole = all(wanted[name] == found for name, (found, _) in done.items())
        finish(ossnet(*common, "--out", str(disturbed)))
        now = {file.name: (checksum(file), file.stat().st_mtime_ns) for file in disturbed.glob("*.nii.gz")}
        kept = all(now[name] == facts for name, facts in done.items())
        equal = {name: found for name, (found, _) in now.items()} == wanted
        good = whole and kept and equal
        moments.append(
            Kill(round(after, 2), len(done), "resumed, equal" if good else f"{whole=} {kept=} {equal=}")
        )
        print(moments[-1], flush=True)
    left = [p.name for p in disturbed.glob(".writing-*")]
    return {
        "uninterrupted seconds": round(seconds, 1),
        "scans": len(wanted),
        "kills": [asdict(moment) for moment in moments],
        "half-written files left": left,
    }


def commit() -> str:
    """The state of the project."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def measure(data: Path, work: Path, kills: int, segment_kills: int, seed: int) -> dict[str, Any]:
    """Everything, as `results/kill.json` holds it."""
    rng, state = random.Random(seed), commit()
    work.mkdir(parents=True, exist_ok=True)
    training = kill_training(data, work, kills, rng)
    segmenting = kill_segmenting(data, work / "alone", work, segment_kills, rng)
    return {
        "what": "kill -9 at random moments; variant C on ten scans of 12 x 22 x 18 voxels, through the command line",
        "command": f"python benchmarks/kill.py --kills {kills} --segment-kills {segment_kills} --seed {seed}",
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
