"""Measurements in processes of their own: what one leaves behind does not count for the next.

A script that measures this way defines `here(job)`, which does one job and returns what it found, calls
`measured(job, __file__)` for each, and ends with `run(here, main)`.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = "result: "


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def start_counting() -> int:
    """Give back what is free, forget the peak so far; resident bytes now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def measured(job: dict[str, Any], script: str) -> dict[str, Any]:
    """What `here` of a script says of a job, in a process of its own."""
    done = subprocess.run([sys.executable, script, "--here", json.dumps(job)], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        return {"failed": done.returncode, "last": done.stderr.splitlines()[-3:]}
    return dict(json.loads(lines[-1][len(RESULT) :]))


def run(here: Callable[[dict[str, Any]], dict[str, Any]], main: Callable[[], None]) -> None:
    """The script itself, or one of its jobs."""
    if sys.argv[1:2] == ["--here"]:
        print(RESULT + json.dumps(here(json.loads(sys.argv[2]))))
    else:
        main()
