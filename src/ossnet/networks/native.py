"""The compiled loops of `native.c`: built once a machine, never required.

A C compiler builds them in about a second; the library is kept in the user's cache folder under a name made
from everything that decides its content. Whatever goes wrong (no compiler, no folder, another processor),
`library` answers None and the callers use tensor operations: slower, with the same results up to rounding.

Set the environment variable OSSNET_NATIVE=0 to do without.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("native.c")

_I64, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_AFFINE = [*[_POINTER] * 5, *[_I64] * 4, _POINTER, _INT]
_BACKWARD = [*[_POINTER] * 10, *[_I64] * 3, _POINTER, _INT]
_PATCHES = [_POINTER, _POINTER, _POINTER, _POINTER, _I64, _POINTER, _I64]
# Name → (argument types, whether it reports a failure).
_FUNCTIONS: dict[str, tuple[list[Any], bool]] = {
    "ossnet_affine_pade_f32": (_AFFINE, False),
    "ossnet_affine_pade_bf16": (_AFFINE, False),
    "ossnet_pade_f32": ([_POINTER, _POINTER, _I64, _POINTER, _INT], False),
    "ossnet_pade_bf16": ([_POINTER, _POINTER, _I64, _POINTER, _INT], False),
    "ossnet_affine_pade_backward_f32": (_BACKWARD, True),
    "ossnet_affine_pade_backward_bf16": (_BACKWARD, True),
    "ossnet_patches": ([*_PATCHES, _POINTER, _I64, _INT, _INT], True),
    "ossnet_patch_spectra": ([*_PATCHES, _POINTER, _POINTER, _I64, _I64, _INT], True),
    "ossnet_spectra_pade": (
        [_POINTER, *[_I64] * 4, _POINTER, _POINTER, _POINTER, _POINTER, _I64, _INT],
        False,
    ),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where there are none; decided once a process."""
    if os.environ.get("OSSNET_NATIVE", "1") == "0":
        return None
    try:
        return _load()
    except (OSError, subprocess.SubprocessError, AttributeError, ValueError) as error:
        logging.getLogger(__name__).info("no compiled loops, tensor operations instead: %s", error)
        return None


def _load() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        return None
    errors = []
    # Compilers without OpenMP (Apple's) still give one fast thread.
    # Older clang for ARM knows no processor by that name.
    for flags in (["-march=native", "-fopenmp"], ["-march=native"], []):
        command = [*compiler, "-O3", "-std=gnu99", "-fno-math-errno", "-fno-trapping-math"]
        command += ["-fPIC", "-shared", *flags]
        try:
            try:
                return _declare(ctypes.CDLL(str(_built(command))))
            except (OSError, AttributeError):  # a file that was cut short, say
                return _declare(ctypes.CDLL(str(_built(command, again=True))))
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            errors.append(error)
    raise errors[-1]


def _compiler() -> list[str] | None:
    if sys.platform == "win32":
        return None  # a compiler there needs an environment of its own
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = name.split()
        if words and shutil.which(words[0]):
            return words
    return None


def _built(command: Sequence[str], again: bool = False) -> Path:
    """The library of this command for this machine, compiled unless it is there already."""
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    parts = [SOURCE.read_text(), *command, version, platform.machine(), _processor()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = _folder()
    target = folder / f"native-{digest}.so"
    if again or not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / target.name
            subprocess.run(
                [*command, str(SOURCE), "-o", str(fresh), "-lm"], capture_output=True, timeout=120, check=True
            )
            # Processes that build at the same time replace each other's equal files.
            os.replace(fresh, target)
    return target


def _processor() -> str:
    """What the processor can do: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _folder() -> Path:
    """A folder that only this user can write to: what lies there is run."""
    try:
        # Without a home there is a RuntimeError.
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ossnet"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return _process_folder()


@functools.cache
def _process_folder() -> Path:
    # Kept until the process ends: without a cache every process compiles for itself.
    keep = tempfile.TemporaryDirectory(prefix="ossnet-")
    _KEPT.append(keep)
    return Path(keep.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    for name, (arguments, reports) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = _INT if reports else None
    return loaded
