"""How much memory is free, and refusing what does not fit."""

import os
from contextlib import suppress
from pathlib import Path

from ossnet.errors import ResourceError


def available_memory() -> int:
    """Bytes this process may still take: the smaller of the machine's and the container's free memory."""
    free = [2**63]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        with suppress(AttributeError, ValueError, OSError):
            # No /proc, as on macOS: all there is, since what is free is not told.
            free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError, IndexError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            stat = Path("/sys/fs/cgroup/memory.stat").read_text().split()
            # Cached files count as used there but are given up when memory is asked for.
            cached = int(stat[stat.index("inactive_file") + 1])
            free.append(int(limit) - used + cached)
    return max(0, min(free))


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
