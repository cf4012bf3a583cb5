"""Files that appear whole or not at all.

A reader, a resumed run or another process never sees half a file: bytes go to a temporary file in the same
folder, are flushed to the disk, and the finished file takes the place of the old one in a single step.
"""

import errno
import json
import os
import platform
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ossnet.errors import InputError, ResourceError

_PREFIX = ".writing-"


def _place() -> str:
    """Where process numbers mean one process: the machine, or a container on it."""
    place = platform.node()
    with suppress(OSError):
        place += os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(place.encode()):08x}"


_HOST = _place()
_OWN: set[str] = set()
"""Temporary files that this process is writing; one before it may have had its number."""

# It is told only when it is set: once, before there are threads that write files meanwhile.
_UMASK = os.umask(0o077)
os.umask(_UMASK)

_LONG = 3600.0
"""Seconds after which a file that a process elsewhere began is given up."""

# Quota exceeded is, for a user, the same as a full disk.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it takes the place of `path`.

    Missing folders are made. On any error, also an interrupt, the temporary file is removed and `path` is as
    it was. The temporary name is hidden and ends like `path`, so that writers which look at the ending work.
    A link stays one: what it leads to is replaced. Permissions of a file that is replaced stay as well.

    Raises:
        ResourceError: The disk is full.
        InputError: The folder cannot be written to.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    with _told(path):
        is_new = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = f"{_PREFIX}{_HOST}.{os.getpid()}."
        handle, name = tempfile.mkstemp(prefix=begun, suffix=f"-{path.name}", dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    _OWN.add(temporary.name)
    try:
        with _told(path):
            yield temporary
            _give_usual_permissions(temporary, path)
            _flush(temporary)
            os.replace(temporary, path)
            with suppress(PermissionError):  # a folder may be written to and not read; the file is there
                _flush(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
            if is_new:
                path.parent.rmdir()
        raise
    finally:
        _OWN.discard(temporary.name)


def require_folder(path: Path | str) -> None:
    """Refuse a place where no folder can be made or written to, before hours of work find out. Nothing is made.

    Raises:
        InputError: It is a file, or lies in one, or may not be written to, or a link leads nowhere.
    """
    path = Path(path).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not os.path.exists(nearest):
        raise InputError(nearest, "is a link to what is not there", "Choose another place for the output")
    if not nearest.is_dir():
        raise InputError(nearest, "is a file, not a folder", "Choose another place for the output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(nearest, "may not be written to", "Choose another place for the output")


def clear_unfinished(path: Path | str) -> None:
    """Remove what killed processes left of writing `path`, or of any file below it where it is a folder.

    What a process is writing now stays: one of this machine that lives, or any within the last hour.
    """
    path = Path(path)
    folder, name = (path, ".+") if path.is_dir() else (path.parent, re.escape(path.name))
    ours = re.compile(rf"{re.escape(_PREFIX)}(?:(?P<host>[0-9a-f]{{8}})\.(?P<pid>\d+)\.)?[^-]+-{name}")
    for file in list(path.rglob(f"{_PREFIX}*") if path.is_dir() else folder.glob(f"{_PREFIX}*")):
        match = ours.fullmatch(file.name)
        if match and not _is_written(file, match["host"], match["pid"]):
            with suppress(OSError):
                file.unlink()


def _is_written(file: Path, host: str | None, pid: str | None) -> bool:
    """Whether the process that began a temporary file may be at work on it."""
    if host is None or pid is None:
        return False
    if host == _HOST and int(pid) == os.getpid():
        return file.name in _OWN
    if host == _HOST and os.name != "nt":  # there this signal would end it
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        return True
    with suppress(OSError):
        return time.time() - file.stat().st_mtime < _LONG
    return True


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write bytes atomically (errors as in `atomic_write`)."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically (errors as in `atomic_write`).

    Names of files that are no text are told as JSON tells what has no letter.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically (errors as in `atomic_write`).

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON does not know.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the operating system says about the disk into a message for people."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number in _FULL:
            raise ResourceError(
                f"{path}: the disk is full; nothing was changed. Free some space and run the command again."
            ) from error
        if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)) or (
            number in (errno.EROFS, errno.ENAMETOOLONG)
        ):
            raise InputError(
                path, f"cannot be written ({os.strerror(number or 0)})", "Choose another place for the output"
            ) from error
        raise


def _error_number(error: Exception) -> int | None:
    """What the operating system said; safetensors, which is written in Rust, has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _flush(path: Path) -> None:
    """Make the operating system put a file or folder on the disk, where it can."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    # Windows flushes what may be written only.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse fsync; the rename is still atomic.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


def _give_usual_permissions(temporary: Path, path: Path) -> None:
    """Temporary files are private; a result is as readable as what it replaces, or as any file of this user."""
    mode = 0o666 & ~_UMASK
    with suppress(OSError):
        mode = path.stat().st_mode & 0o777
    with suppress(OSError):
        temporary.chmod(mode)
