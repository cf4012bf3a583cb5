"""How much memory is free, and refusing what does not fit."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ossnet.errors import ResourceError

_GROUPS = Path("/sys/fs/cgroup")
"""Control groups of Linux: how containers, and the jobs of clusters, are kept to their memory."""

_MEMBER = Path("/proc/self/cgroup")
"""The groups that this process is in."""


Given = TypeVar("Given")
Result = TypeVar("Result")


def available_memory() -> int:
    """Bytes this process may still take: the least of the machine's, the container's and the job's free memory."""
    free = [2**63, *_left_by_groups()]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        with suppress(AttributeError, ValueError, OSError):
            # No /proc, as on macOS: all there is, since what is free is not told.
            free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        with suppress(AttributeError, OSError):
            free.append(_left_by_windows())
    return max(0, min(free))


class _WindowsMemory(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *(
            (name, ctypes.c_uint64)
            for name in ("total", "free", "total_page", "free_page", "total_own", "own")
        ),
        ("extended", ctypes.c_uint64),
    )


def _left_by_windows() -> int:
    """Free physical memory as Windows tells it; elsewhere an AttributeError."""
    found = _WindowsMemory(length=ctypes.sizeof(_WindowsMemory))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(found)):  # type: ignore[attr-defined]
        raise OSError("GlobalMemoryStatusEx failed")
    return int(found.free)


def _left_by_groups() -> Iterator[int]:
    """Bytes that each limit leaves: of the groups of this process and of all above them, in both versions."""
    lines: list[str] = []
    with suppress(OSError):
        lines = _MEMBER.read_text().splitlines()
    for line in lines or ["0::/"]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            top, limit, used, cached = _GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit = _GROUPS / "memory", "memory.limit_in_bytes"
            used, cached = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container its own group lies at the top, whatever path the system knows it by.
        group = top / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(top))):
            with suppress(OSError, ValueError, IndexError):
                most, stat = (
                    (folder / limit).read_text().strip(),
                    (folder / "memory.stat").read_text().split(),
                )
                if most != "max":
                    # Cached files count as used but are given up when memory is asked for.
                    given_up = int(stat[stat.index(cached) + 1])
                    yield int(most) - int((folder / used).read_text()) + given_up


def check_memory(path: Path, nbytes: int) -> None:
    """Refuse what cannot fit.

    Raises:
        ResourceError: `nbytes` are more than is free.
    """
    free = available_memory()
    if nbytes > free:
        raise ResourceError(
            f"{path}: needs {nbytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free. "
            "Close other programs, use a larger machine, or crop the scan."
        )


def beside_others(work: Callable[[Given], Result], given: Given) -> Result | None:
    """What one of several threads makes; None where the others leave too little memory: it may have room after them.

    An error would keep what was made so far, with its traceback.
    """
    with suppress(ResourceError, MemoryError):
        return work(given)
    return None
