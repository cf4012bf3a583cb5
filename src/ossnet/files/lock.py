"""One process at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ossnet.errors import InputError

_NAME = ".lock"


@contextmanager
def alone_in(folder: Path | str) -> Iterator[None]:
    """Work in a folder that no other process may work in meanwhile; made if it is missing, and gone if left empty.

    The lock ends with its process, however that ends. On file systems that have no locks there is none.

    Raises:
        InputError: Another process works in it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            folder, "another process works in it", "Wait until it has ended, or choose another folder"
        ) from None
    except (NotImplementedError, OSError):
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                (folder / _NAME).unlink()
            lock.release()
        with suppress(OSError):
            folder.rmdir()
