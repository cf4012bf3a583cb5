"""`ossnet train` refuses what it cannot use before it writes anything, and keeps what it has."""

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tests.cli.refusals import ended, files_in, interrupted, refused, started, succeeded
from tests.training.conftest import SMALL
from typer.testing import CliRunner

import ossnet
from ossnet.cli import main
from ossnet.cli.train import Watcher
from ossnet.training.loop import State
from ossnet.volume import LabelMap, Volume

FAST = [
    *SMALL,
    "schedule.epochs=1",
    "validation.dense=false",
    "validation.picture=false",
    "runtime.accelerator=cpu",
]


def settings(*changes: str) -> list[str]:
    return [part for change in (*FAST, *changes) for part in ("--set", change)]


def train(data: Path, out: Path, *more: object) -> list[object]:
    return ["train", "--data", data, "--out", out, "--variant", "C", *settings(), *more]


@pytest.fixture
def data(balls: Path, tmp_path: Path) -> Path:
    """A data set to spoil."""
    return Path(shutil.copytree(balls, tmp_path / "data"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--variant", "E"], "'E' is unknown. Choose one of"),
        (["--preset", "kits"], "'kits' is unknown. Choose one of brats2020, lits"),
        (["--set", "nonsense"], "has no ="),
        (["--set", "schedule.epoch=3"], "Perhaps schedule.epochs is meant"),
        (["--set", "schedule=3"], "group of settings"),
        (["--set", "schedule.epochs=many"], "schedule.epochs: 'many'"),
        (["--set", "schedule.epochs=0"], "greater than or equal to 1"),
        (["--set", "data.spacing=0,1,1"], "greater than 0"),
        (["--set", "data.spacing=nan,1,1"], "data.spacing"),
        (["--set", "data.shape=0,8,8"], "data.shape"),
        (["--set", "seed=99999999999999999999"], "seed"),
        (["--set", "augmentation.flip_axes=[7]"], "augmentation.flip_axes"),
        (["--fold", "x"], "data.fold: 'x' is not an allowed value. Its meaning: number of the fold"),
        (["--set", "optimiser.learning_rate=1"], "Perhaps optimiser.lr is meant"),
        (["--set", "data.fold=9"], "there is no fold 9"),
        (["--set", "data.fold=paper"], "no split"),
        (["--set", "data.layout=lits"], "no cases of the layout lits"),
        (["--set", "data.layout=foo"], "no layout 'foo'"),
        (["--minutes", "-1"], "schedule.minutes"),
        (["--minutes", "inf"], "schedule.minutes"),
        (["--devices", "0"], "runtime.devices"),
        (["--variant", "C", "--set", "data.shape=33,32,32"], "multiple of"),
        (["--variant", "C", "--set", "data.shape=8,8,8", "--set", "network.blocks=4,8"], "largest scan"),
        (["--variant", "C", "--devices", "3"], "cannot be shared by 3 processes"),
    ],
)
def test_settings_without_meaning(balls: Path, tmp_path: Path, given: list[str], said: str) -> None:
    assert said in refused(tmp_path, "train", "--data", balls, "--out", tmp_path / "run", *given)


def test_a_dry_run_says_what_would_be_picked_and_writes_nothing(balls: Path, tmp_path: Path) -> None:
    said = succeeded("train", "--data", balls, "--minutes", "5", "--dry-run").splitlines()
    assert said[:2] == ["8 training and 2 validation cases of Dataset001_Balls", "structures: shell, core"]
    assert any(line.startswith("grid: 2 × 1 × 1 mm") for line in said)
    assert any(line.startswith("5 minutes: ") for line in said)
    assert not list(tmp_path.iterdir())
    assert "Name the data set" in refused(tmp_path, "train", "--dry-run")


def test_no_cuda(balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refused(tmp_path, *train(balls, tmp_path / "run", "--set", "runtime.accelerator=cuda"))
    assert "there is no CUDA device" in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.json", "{", "not valid JSON"),
        ("c.json", "[]", "holds no settings"),
        ("c.toml", "[schedule]\nepoch = 3\n", "schedule.epoch is unknown"),
        ("c.toml", "[schedule\n", "not valid JSON or TOML"),
    ],
)
def test_settings_files(balls: Path, tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    message = refused(
        tmp_path, "train", "--data", balls, "--out", tmp_path / "run", "--config", tmp_path / name
    )
    assert said in message
    assert name in message


def test_paths_that_are_not_what_they_should_be(balls: Path, tmp_path: Path) -> None:
    scan = balls / "imagesTr" / "ball_00_0000.nii.gz"
    (tmp_path / "file").write_text("")
    run = tmp_path / "run"
    assert "no such folder" in refused(tmp_path, *train(tmp_path / "none", run))
    assert "a file, not a folder" in refused(tmp_path, *train(scan, run))
    assert "a file, not a folder" in refused(tmp_path, *train(balls, tmp_path / "file"))
    assert "a file, not a folder" in refused(tmp_path, *train(balls, tmp_path / "file" / "run"))
    assert "cannot be read" in refused(tmp_path, *train(balls, run, "--config", tmp_path / "none.json"))
    assert "no run to resume" in refused(tmp_path, "train", "--data", balls, "--out", run, "--resume")
    assert "--data and --out are needed" in refused(tmp_path, "train", "--out", run)


def spoil_image(data: Path) -> str:
    file = data / "imagesTr" / "ball_05_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:500])
    return "ball_05_0000.nii.gz: the file ends before"


def spoil_label(data: Path) -> str:
    file = data / "labelsTr" / "ball_05.nii.gz"
    image = nib.load(file)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = 9
    LabelMap(voxels, image.affine).save(file)
    return "ball_05.nii.gz: holds label 9"


def move_label(data: Path) -> str:
    file = data / "labelsTr" / "ball_05.nii.gz"
    image = nib.load(file)
    LabelMap(np.asarray(image.dataobj), image.affine + np.eye(4)[[0, 1, 2, 3]] * 0.1).save(file)
    return "ball_05.nii.gz: does not lie on its image"


def remove_label(data: Path) -> str:
    (data / "labelsTr" / "ball_05.nii.gz").unlink()
    return "ball_05_0000.nii.gz: has no label"


def spoil_description(data: Path) -> str:
    (data / "dataset.json").write_text("{")
    return "dataset.json: is not valid JSON"


def spoil_splits(data: Path) -> str:
    (data / "splits_final.json").write_text('[{"train": ["a"], "val": ["b"]}]')
    return "a is not in the data set"


def more_channels(data: Path) -> str:
    file = data / "imagesTr" / "ball_05_0000.nii.gz"
    image = nib.load(file)
    voxels = np.asarray(image.dataobj)
    Volume(np.stack([voxels, voxels]), image.affine).save(file)
    return "ball_05_0000.nii.gz: has 2 channels"


SPOILERS = [
    spoil_image,
    spoil_label,
    move_label,
    remove_label,
    spoil_description,
    spoil_splits,
    more_channels,
]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_spoilt_data(data: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    said = spoil(data)
    assert said in refused(tmp_path, *train(data, tmp_path / "run"), notes=True)


def test_nan_is_refused_or_replaced(data: Path, tmp_path: Path) -> None:
    file = data / "imagesTr" / "ball_05_0000.nii.gz"
    image = nib.load(file)
    voxels = np.asarray(image.dataobj).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    Volume(voxels[None], image.affine).save(file)
    assert "--replace-nan" in refused(tmp_path, *train(data, tmp_path / "run"), notes=True)
    process = started(*train(data, tmp_path / "run", "--replace-nan"))
    code, said = ended(process)
    assert code == 0, said
    assert "1 of 4,752 voxels are NaN or infinite; they are replaced" in said
    assert "replace_nan" in (tmp_path / "run" / "settings.json").read_text()


def test_what_a_training_says(balls: Path, tmp_path: Path) -> None:
    """Nothing but our own lines, whatever the libraries have to say; then a resume, and what it refuses."""
    code, said = ended(started(*train(balls, tmp_path / "run", "--set", "runtime.precision=bf16-mixed")))
    assert code == 0, said
    lines = said.splitlines()
    assert lines[0] == "8 training and 2 validation cases of Dataset001_Balls"
    assert any(line.startswith("on ") and "in bfloat16" in line for line in lines)
    assert lines[-1] == f"finished: {tmp_path / 'run'}"
    for noise in ("arning", "Lightning", "mixed", "Automatic", "/site-packages/"):
        assert noise not in said
    assert "there is a run already" in refused(tmp_path, *train(balls, tmp_path / "run"))
    given = train(balls, tmp_path / "run", "--set", "runtime.precision=bf16-mixed", "--resume")
    assert "finished" in succeeded(*given)
    # The machine may be another one.
    machine = ["--device", "cpu", "--set", "runtime.threads=2", "--set", "data.cache_gb=4"]
    assert "finished" in succeeded("train", "--out", tmp_path / "run", "--resume", *machine)
    message = refused(tmp_path, *given, "--set", "schedule.epochs=7")
    assert "schedule.epochs: 7 is given, the run was started with 1" in message
    shutil.copytree(balls, tmp_path / "fewer")
    (tmp_path / "fewer" / "imagesTr" / "ball_03_0000.nii.gz").unlink()
    (tmp_path / "fewer" / "labelsTr" / "ball_03.nii.gz").unlink()
    other = ["train", "--data", tmp_path / "fewer", "--out", tmp_path / "run", "--resume"]
    assert "no longer has the cases" in refused(tmp_path, *other, notes=True)


@pytest.mark.parametrize(
    ("seconds_a_step", "batch_size", "steps_until_said", "said"),
    [
        (0.3, 1, 26, "0.3 s a step: about 12,000 steps in all"),
        (70.0, 8, 3, "70 s a step: about 51 steps in all, 56 minutes to go"),
    ],
)
def test_how_long_it_takes_is_said_early(
    capsys: pytest.CaptureFixture[str],
    seconds_a_step: float,
    batch_size: int,
    steps_until_said: int,
    said: str,
) -> None:
    """Also where a step takes minutes; then that a smaller batch makes more of them."""
    with Watcher(batch_size) as watcher:
        for step in range(1, steps_until_said + 1):
            assert "s a step" not in capsys.readouterr().err
            seconds = step * seconds_a_step
            watcher.step(State(step=step, seconds=seconds), 1.0, seconds / 3600)
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert ("schedule.batch_size=1" in told) == (batch_size > 1)


def test_the_data_set_stays_apart(balls: Path, tmp_path: Path) -> None:
    for folder in (balls, balls / "imagesTr", balls / "labelsTr"):
        assert "the data set lies in it" in refused(balls, *train(balls, folder), notes=True)


def test_cases_that_another_model_has_seen_are_told(balls: Path, tmp_path: Path) -> None:
    succeeded(*train(balls, tmp_path / "first", "--fold", "0"))
    told = succeeded(*train(balls, tmp_path / "same", "--fold", "0", "--init", tmp_path / "first"))
    assert "beware" not in told
    told = succeeded(*train(balls, tmp_path / "other", "--fold", "1", "--init", tmp_path / "first" / "model"))
    assert "beware: 2 of 2 cases left out were trained on by" in told
    assert "beware: 2 of 2" in (tmp_path / "other" / "plan.txt").read_text()
    # A model alone does not know its cases.
    (tmp_path / "first" / "model").rename(tmp_path / "model")
    told = succeeded(*train(balls, tmp_path / "third", "--fold", "1", "--init", tmp_path / "model"))
    assert "was trained on cases of a data set of this name" in told


def test_a_card_has_the_scores_of_whole_scans(balls: Path, tmp_path: Path) -> None:
    succeeded(*train(balls, tmp_path / "run", "--set", "validation.dense=true"))
    told = succeeded("info", tmp_path / "run")
    assert "core, whole scans of" in told
    assert "Fingerprint, as reports name it: " in told
    known = ossnet.load(tmp_path / "run")
    assert known.fingerprint() in told.replace("\n", "")
    assert "shell; core" in repr(known).replace(", ", "; ")


def test_interrupted(balls: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(*train(balls, run, "--set", "schedule.epochs=1000"))
    code, said = interrupted(process, (run / "log.csv").exists)
    assert code == 130, said
    assert said.splitlines()[-2:] == [
        f"go on with: ossnet train --resume --out {run}",
        "interrupted; what was finished is kept",
    ]
    assert "Traceback" not in said
    assert (run / "state.safetensors").exists()
    assert not [p for p in files_in(run) if p.name.startswith(".writing-")]


def test_a_full_disk(balls: Path, tmp_path: Path) -> None:
    """The state does not fit any more: one message, and the last good state is still there."""
    run = tmp_path / "run"
    succeeded(*train(balls, run))
    good = (run / "state.safetensors").read_bytes()
    settings_file = run / "settings.json"
    settings_file.write_text(settings_file.read_text().replace('"epochs": 1,', '"epochs": 3,'))
    resume = ["train", "--data", balls, "--out", run, "--resume"]
    code, said = ended(started(*resume, limit_bytes=100_000))
    assert code == 2, said
    assert "the disk is full" in said
    assert "Traceback" not in said
    assert said.count("error:") == 1
    assert (run / "state.safetensors").read_bytes() == good
    assert not [p for p in files_in(run) if p.name.startswith(".writing-")]
    assert "finished" in succeeded(*resume)


def test_help_shows_examples() -> None:
    for command in ("train", "segment", "info", "import-weights", "evaluate", "check", "mesh", "demo"):
        said = succeeded(command, "--help")
        assert "Example" in said
        assert f"ossnet {command}" in said
    assert "schedule.epochs" in succeeded("train", "--help-settings")


def test_settings_are_listed_as_a_preset_has_them(tmp_path: Path) -> None:
    def value(setting: str, *given: object) -> str:
        listed = succeeded("train", "--help-settings", *given)
        return next(line.split("│")[2] for line in listed.splitlines() if setting in line).strip()

    assert value("optimiser.name") == "muon"
    assert value("optimiser.name", "--preset", "lits") == value("optimiser.name", "--variant", "C")
    assert value("data.fold", "--preset", "lits") == "paper"
    (tmp_path / "own.toml").write_text("[optimiser]\nlr = 0.125\n")
    assert value("optimiser.lr", "--config", tmp_path / "own.toml") == "0.125"


def test_a_training_that_runs_out_of_memory_says_how_to_go_on(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Watcher):
        def step(self, state: State, loss: float, fraction: float) -> None:
            if (tmp_path / "run" / "state.safetensors").exists():
                raise MemoryError

    monkeypatch.setattr("ossnet.cli.train.Watcher", Full)
    asked = train(balls, tmp_path / "run", "--set", "schedule.epochs=3")
    done = CliRunner().invoke(main.app, [str(given) for given in asked])
    assert done.exit_code == 2
    hint, error = done.output.splitlines()[-2:]
    assert hint == f"go on with: ossnet train --resume --out {tmp_path / 'run'}"
    assert "sampling.locations" in error
