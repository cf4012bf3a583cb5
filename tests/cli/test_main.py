"""The command line answers quickly, and every refusal is one message."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ossnet.cli import main
from ossnet.cli.common import progress, say, told
from ossnet.errors import ResourceError, VolumeError

run = CliRunner()


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with the large modules that it loaded as the last line of stderr."""
    code = """
import sys
from ossnet.cli.main import app
try:
    app()
finally:
    large = {"torch", "nibabel", "scipy", "matplotlib"}
    print("LOADED", *sorted(large & set(sys.modules)), file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_commands_and_loads_nothing_large() -> None:
    answer = started("--help")
    assert answer.returncode == 0
    assert "check" in answer.stdout
    assert answer.stderr.splitlines()[-1] == "LOADED"


def test_help_of_each_command_does_without_torch() -> None:
    code = f"""
import sys
from ossnet.cli.main import app
for name in {list(main.COMMANDS)}:
    app([name, "--help"], standalone_mode=False)
    assert "torch" not in sys.modules, name
"""
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("Usage: ") == len(main.COMMANDS)


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_how_threads_wait_is_the_users_choice(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]
) -> None:
    environment = dict(chosen)
    monkeypatch.setattr(main.os, "environ", environment)
    main._spare_processors()
    assert environment == (chosen or {"GOMP_SPINCOUNT": "1000"})


def test_version_and_unknown_commands() -> None:
    assert run.invoke(main.app, ["--version"]).output.startswith("ossnet ")
    answer = run.invoke(main.app, ["chek"])
    assert answer.exit_code == 2
    assert "Did you mean 'check'" in answer.output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            VolumeError(Path("a [b].nii"), "it is odd", "Mend it"),
            2,
            "error: a [b].nii: it is odd. Mend it.\n",
        ),
        (ResourceError("the disk is full"), 2, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept\n"),
        (OSError(28, "No space left on device", "a.csv"), 2, "error: a.csv: No space left on device.\n"),
        (MemoryError(), 2, "error: memory ran out"),
    ],
)
def test_errors_become_one_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped, told():
        raise error
    assert stopped.value.exit_code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_other_errors_are_ours_and_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), told():
        _ = 1 / 0


def test_warnings_become_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    with told():
        warnings.simplefilter("always")
        warnings.warn("a.nii: no affine is given.", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: a.nii: no affine is given.\n"


def test_long_messages_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    say("/very/long/path" * 30, "note")
    assert capsys.readouterr().err == "note: " + "/very/long/path" * 30 + "\n"


def test_progress_is_quiet_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Reading", 3) as done:
        done(3)
    assert capsys.readouterr() == ("", "")
