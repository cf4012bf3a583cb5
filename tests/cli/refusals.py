"""What every command does with bad input: exit code 2, one message, no traceback, nothing written."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from ossnet.cli import main


def files_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(where: Path, *arguments: object, notes: bool = False) -> str:
    """Run a command that must be refused; the message.

    Args:
        where: Folder in which nothing may appear.
        notes: Allow lines of progress before the message.
    """
    before = files_in(where)
    done = CliRunner().invoke(main.app, [str(argument) for argument in arguments])
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    lines = done.output.strip().splitlines()
    assert done.stdout == ""
    assert [line.startswith("error: ") for line in lines].count(True) == 1, lines
    assert lines[-1].startswith("error: ")
    assert notes or len(lines) == 1, lines
    assert files_in(where) == before
    return lines[-1].removeprefix("error: ")


def succeeded(*arguments: object) -> str:
    """Run a command that must do its work; what it said."""
    done = CliRunner().invoke(main.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def started(*arguments: object, limit_bytes: int | None = None) -> subprocess.Popen[str]:
    """A command in a process group of its own.

    Args:
        limit_bytes: Largest file that it can write: then the system says what it says of a full disk.
    """
    # Shells start what runs in their background with Ctrl-C ignored, and children inherit that.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from ossnet.cli.main import run; run()"
    if limit_bytes is not None:
        # Beyond the limit a signal comes first, which would end the process; ignored, writing fails (EFBIG).
        limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))"
        code = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limit}; {code}"
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and everything said."""
    out, err = process.communicate(timeout=180)
    return process.returncode, out + err


def interrupted(process: subprocess.Popen[str], when: Callable[[], bool]) -> tuple[int, str]:
    """Ctrl-C as soon as something is true; exit code, and everything said."""
    begun = time.monotonic()
    while not when():
        assert process.poll() is None, ended(process)
        assert time.monotonic() - begun < 180
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    return ended(process)
