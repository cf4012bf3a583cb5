"""Training steps and segmentations of real scans at full size: memory, seconds, locations.

    python benchmarks/full_size.py DATA … [--output FILE] [--only TEXT] [--steps N] [--limit SECONDS]

DATA are data sets in any layout. BraTS and LiTS are trained with the paper's presets (256×256×160, 8 volumes;
512³, 4 volumes; 2^14 locations each; cases repeat where there are fewer than a batch), other data sets with
variant C on the grid that `ossnet check` proposes and with the default variant. A few steps only: what is
measured is what a step takes. The model of each run then segments scans of the data set by the command line,
with several strategies. Networks that have seen a few steps answer with ragged surfaces: a hard case for the
octree, whose time follows the surface.

Every run is a process of its own; its peak is the high-water mark of resident memory that the kernel keeps,
interpreter and libraries (`idle_mb`) included. With `--only` results of other runs in the file are kept.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from provenance import commit, processor
from surfaces import surface_voxels

PAPER = (
    "schedule.epochs=1",
    "validation.dense=false",
    "validation.locations=16384",
    "validation.picture=false",
)
MEASURED = "measured: "


@dataclass(frozen=True)
class Run:
    """One training and what its model segments."""

    name: str
    changes: tuple[str, ...]
    preset: str | None = None
    variant: str | None = None
    strategies: tuple[str, ...] = ("auto", "original", "released")
    box: tuple[int, int, int] = (40, 40, 40)
    """Voxels that are asked one by one and compared with the octree's answer."""


def runs_for(layout: str, steps: int) -> list[Run]:
    """What is tried on a data set of this layout."""
    every = (*PAPER, f"schedule.steps_per_epoch={steps}")
    if layout.startswith(("brats", "lits")):
        preset = "lits" if layout == "lits" else "brats2020"
        paper = [
            Run(
                f"{preset}, C, {precision}",
                (*every, "data.fold=all", f"runtime.precision={precision}"),
                preset,
            )
            for precision in ("32-true", "bf16-mixed")
        ]
        default = Run(
            "default variant",
            (*every, "data.fold=all", "schedule.minutes=none"),
            variant="multiscale",
            strategies=("auto",),
        )
        return [*paper, default]
    return [
        Run("proposed fit, C, 32-true", (*every, "data.fold=0"), variant="C", strategies=("auto",)),
        Run(
            "default variant",
            (*every, "data.fold=0", "schedule.minutes=none"),
            variant="multiscale",
            strategies=("auto",),
        ),
    ]


@dataclass
class Watched:
    """A finished process."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    output: str
    errors: list[str] = field(default_factory=list)


def watch(command: Sequence[str], limit: float) -> Watched:
    """Run a command; its peak of resident memory is read while it runs."""
    started, before = time.perf_counter(), children_cpu_seconds()
    stopped = False
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, high_water_mb(process.pid))
            if time.perf_counter() - started > limit:
                stopped = True
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        lines = [line.rstrip() for line in err.read().splitlines() if line.strip()]
        if stopped:
            lines.append(f"stopped after {limit:.0f} s")
        cpu = children_cpu_seconds() - before
        return Watched(process.returncode, seconds, cpu, peak, out.read(), lines)


def children_cpu_seconds() -> float:
    """Processor time of all processes that were started here and have ended."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def high_water_mb(pid: int) -> float:
    """The kernel's high-water mark of a process's resident memory, in MB (10^6 bytes); 0 when it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


# In processes of their own -----------------------------------------------------------------------------------------


def train_here(data: Path, out: Path, run: Run) -> None:
    """Train with the Python interface and print what each step took."""
    from ossnet.training.settings import make_settings
    from ossnet.training.train import train

    class Steps:
        def __init__(self) -> None:
            self.at: list[float] = []
            self.cpu: list[float] = []
            self.losses: list[float] = []

        def step(self, state: Any, loss: float, fraction: float) -> None:
            self.at.append(state.seconds)
            self.cpu.append(time.process_time())
            self.losses.append(loss)

        def validated(self, row: dict[str, Any]) -> None:
            pass

    steps, said = Steps(), []
    started = time.perf_counter()
    settings = make_settings(run.variant, run.preset, None, run.changes)
    train(data, out, settings, listener=steps, say=said.append)
    seconds = [b - a for a, b in zip([0.0, *steps.at], steps.at, strict=False)]
    print(MEASURED + json.dumps({
        "said": said,
        "seconds_per_step": [round(s, 2) for s in seconds],
        "cpu_seconds_after_each_step": [round(s, 1) for s in steps.cpu],
        "losses": [round(v, 4) for v in steps.losses],
        "seconds_before": round(time.perf_counter() - started - sum(seconds), 2),
    }))  # fmt: skip


def high_water_mb_of_self() -> float:
    """This process's own mark."""
    import os

    return high_water_mb(os.getpid())


def idle_here() -> None:
    """What a process holds before it does anything."""
    import ossnet.training.train  # noqa: F401

    print(MEASURED + json.dumps({"idle_mb": round(high_water_mb_of_self())}))


def compare_here(scan: Sequence[Path], labels: Path, model: Path, box: Sequence[int]) -> None:
    """Whether the label map lies on the scan, and equals asking everywhere in a box about a surface."""
    import numpy as np
    from scipy import ndimage

    import ossnet

    volume, found = ossnet.read(list(scan)), ossnet.read_labels(labels)
    lies = volume.shape == found.shape and bool(np.allclose(volume.affine, found.affine, atol=1e-5))
    data = found.data
    change = np.argwhere(data[1:] != data[:-1])
    rng = np.random.default_rng(0)
    middle = change[rng.integers(len(change))] if len(change) else np.array(data.shape) // 2
    size = np.minimum(box, data.shape)
    low = np.clip(middle - size // 2, 0, np.array(data.shape) - size)
    region = (tuple(int(v) for v in low), tuple(int(v) for v in low + size))
    part = ossnet.load(model).field(volume).segment(region=region, strategy="dense")
    here = data[tuple(slice(a, b) for a, b in zip(*region, strict=True))]
    wrong = here != part.data
    # A component that a location hit is right throughout: a piece of it in the box is right or wrong as a whole.
    torn = 0
    for label in np.unique(part.data):
        pieces, count = ndimage.label(part.data == label)
        bad = np.bincount(pieces[wrong], minlength=count + 1)[1:]
        torn += int(((bad > 0) & (bad < np.bincount(pieces.ravel(), minlength=count + 1)[1:])).sum())
    print(MEASURED + json.dumps({
        "lies_on_scan": lies,
        "box": region,
        "box_voxels": int(wrong.size),
        "box_wrong": int(wrong.sum()),
        "box_components_torn": torn,
        "box_labels": {int(k): int(n) for k, n in zip(*np.unique(part.data, return_counts=True), strict=True)},
        "surface_voxels": surface_voxels(data)[0],
        "labels": {int(k): int(n) for k, n in zip(*np.unique(data, return_counts=True), strict=True)},
    }))  # fmt: skip


# The parent, which stays small --------------------------------------------------------------------------------------


def measured(done: Watched) -> dict[str, Any]:
    """The line that a process printed, with its time and memory."""
    row: dict[str, Any] = {"seconds": round(done.seconds, 1), "cpu_seconds": round(done.cpu_seconds, 1),
                           "peak_mb": round(done.peak_mb)}  # fmt: skip
    for line in done.output.splitlines():
        if line.startswith(MEASURED):
            row |= json.loads(line[len(MEASURED) :])
    if done.code:
        row["failed"] = {"code": done.code, "last": done.errors[-5:]}
    if warned := [line for line in done.errors if "arning" in line]:
        row["warnings"] = warned[:5]
    return row


def step(what: str, *arguments: object, limit: float) -> dict[str, Any]:
    """Run one of the functions above in a process of its own."""
    return measured(watch([sys.executable, __file__, "--here", what, *map(str, arguments)], limit))


def segment(data: Path, run: Run, model: Path, folder: Path, cases: int, limit: float) -> dict[str, Any]:
    """Segment the first scans of a data set by the command line, and look at the label maps."""
    from ossnet.data.scans import images_in

    out: dict[str, Any] = {}
    for case in images_in(data)[:cases]:
        for strategy in run.strategies:
            target = folder / f"{case.name}_{strategy}.nii.gz"
            channels = ["--channels"] if len(case.images) > 1 else []
            done = watch(
                [sys.executable, "-m", "ossnet", "segment", *map(str, case.images), *channels,
                 "--model", str(model), "--out", str(target), "--strategy", strategy, "--json"],
                limit,
            )  # fmt: skip
            row = measured(done)
            if done.code == 0:
                (entry,) = json.loads(done.output)["scans"].values()
                keys = ("locations", "encoder_seconds", "octree_seconds", "strategy", "shape")
                row |= {key: entry[key] for key in keys}
                if strategy == "auto":
                    job = {"scan": [str(p) for p in case.images], "labels": str(target), "model": str(model),
                           "box": run.box}  # fmt: skip
                    row["check"] = step("compare", json.dumps(job), limit=limit)
                else:
                    from ossnet.files.reading import read_header

                    scan, found = read_header(case.images[0]), read_header(target)
                    row["lies_on_scan"] = scan.shape == found.shape and bool(
                        (abs(scan.affine - found.affine) < 1e-5).all()
                    )
            out[f"{case.name}, {strategy}"] = row
            print(case.name, strategy, json.dumps(row)[:500], flush=True)
    return out


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import os
    from importlib.metadata import version

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": [round(v, 1) for v in os.getloadavg()],  # others may use the machine: compare processor time
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "ossnet": version("ossnet"),
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "full_size.json")
    parser.add_argument("--only", default="", help="runs whose data set and name hold this text")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cases", type=int, default=2, help="scans of each data set that are segmented")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for each process")
    parser.add_argument("--no-segment", action="store_true", help="train only")
    arguments = parser.parse_args()

    from ossnet.data.layouts import open_dataset
    from ossnet.files.atomic import write_text

    known = json.loads(arguments.output.read_text()) if arguments.only and arguments.output.exists() else {}
    report = {"what": __doc__.split("\n")[0], "idle": step("idle", limit=120), "runs": known.get("runs", {})}
    for data in arguments.data:
        for run in runs_for(open_dataset(data).layout, arguments.steps):
            name = f"{data.resolve().name}: {run.name}"
            if arguments.only not in name:
                continue
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                job = {"data": str(data), "out": str(folder / "run"), "run": asdict(run)}
                row: dict[str, Any] = {"machine": machine(), "settings": run.changes, "preset": run.preset}
                row["train"] = step("train", json.dumps(job), limit=arguments.limit)
                print(name, json.dumps(row["train"]), flush=True)
                if "failed" not in row["train"] and not arguments.no_segment:
                    row["segment"] = segment(
                        data, run, folder / "run", folder, arguments.cases, arguments.limit
                    )
                report["runs"][name] = row
                write_text(arguments.output, json.dumps(report, indent=1) + "\n")


def here(what: str, argument: str = "{}") -> None:
    """In a process of its own."""
    job = json.loads(argument)
    if what == "idle":
        idle_here()
    elif what == "train":
        run = job["run"]
        train_here(
            Path(job["data"]), Path(job["out"]),
            Run(run["name"], tuple(run["changes"]), run["preset"], run["variant"]),
        )  # fmt: skip
    else:
        compare_here([Path(p) for p in job["scan"]], Path(job["labels"]), Path(job["model"]), job["box"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        here(*sys.argv[2:])
    else:
        main()
