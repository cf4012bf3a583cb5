"""Memory as a promise: sizes from what users write, chunks from what they grant, retreat when it runs out."""

import re
import warnings
from collections.abc import Callable
from math import prod
from typing import TypeVar

import torch

from ossnet.errors import ResourceError, SettingsError, is_out_of_memory
from ossnet.files.memory import available_memory
from ossnet.volume import Shape

LIBRARIES = 96_000_000
"""What convolutions and products take on their first use: code, tables and buffers of the libraries."""

_QUESTION_VALUES = 1 << 21
_QUESTION_LOCATIONS = 1 << 16
_SURFACE_BYTES = 160
"""Working memory of the octree for each voxel at a surface: lists of what to ask, and what it is made from."""

_SITE_BYTES = 32
"""Of the octree for each site of a lattice that is asked whole (measured: 23 to 30)."""

Result = TypeVar("Result")

_UNITS = {"": 0, "B": 0, "K": 1, "KB": 1, "M": 2, "MB": 2, "G": 3, "GB": 3, "T": 4, "TB": 4}


class MemoryNotice(UserWarning):
    """Memory was refused; the work goes on in smaller parts."""


def parse_size(size: str | int | float) -> int:
    """Bytes of "2GB", "1.5 GiB", "800M" or a number of bytes. KB, MB, GB count in thousands, KiB … in 1024.

    Raises:
        SettingsError: If it is not a size above 0.
    """
    text = str(size).strip()
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([kKmMgGtT]?)(i?)([bB]?)", text)
    number = float(match[1]) if match else 0.0
    if match and isinstance(size, str) and not match[2] and 0 < number < 1e6:
        raise SettingsError("memory", f"{text} bytes hold nothing", f'Write for example "{text}GB"')
    if match is None or number <= 0 or (match[3] and not match[2]):
        raise SettingsError(
            "memory", f"{size!r} is not an amount of memory", 'Write for example "2GB" or "800MB"'
        )
    base = 1024 if match[3] else 1000
    return int(number * base ** _UNITS[match[2].upper()])


def format_size(size: int | float) -> str:
    """Bytes for people: "1.5 GB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def require_free(size: int, what: str) -> None:
    """Refuse what this machine cannot hold, whatever is granted: the system would end the process.

    Raises:
        ResourceError: More is asked for than is free.
    """
    if size > (free := available_memory()):
        raise ResourceError(
            f"{format_size(size)} of memory are needed for {what}, {format_size(free)} are free. "
            "Ask for larger voxels or a region, or use a larger machine."
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that a GPU could still give; for other devices, the machine."""
    if device.type != "cuda":
        return available_memory()
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + idle)


def chunk_for(grant: int | None, fixed: int, per_location: int, preferred: int, smallest: int = 256) -> int:
    """Locations to work on at once: `preferred` or the largest half, quarter, … of it that the grant allows.

    Args:
        grant: Bytes for everything above the loaded scan; None for no limit.
        fixed: Bytes that are needed whatever the chunk.
        per_location: Bytes for each location of a chunk.
        preferred: The fastest chunk.
        smallest: Below this, products lose most of their speed.

    Raises:
        ResourceError: If not even the smallest chunk fits.
    """
    if grant is None:
        return preferred
    chunk = preferred
    while chunk > smallest and fixed + chunk * per_location > grant:
        chunk //= 2
    require(grant, fixed + chunk * per_location, "this scan")
    return chunk


def label_bytes(shape: Shape, classes: int) -> int:
    """The octree's state of every voxel, which becomes the label map."""
    # One voxel of padding on each side, and odd lengths.
    return (1 if classes <= 127 else 2) * prod(n + 3 for n in shape)


def question_locations(classes: int) -> int:
    """Locations of one question: their logits stay below 8 MB however many classes there are."""
    return max(min(_QUESTION_LOCATIONS, _QUESTION_VALUES // max(classes, 1)), 1024)


def asking_bytes(shape: Shape, classes: int, surface: int | float) -> int:
    """What segmenting takes beside the network: label map, questions and answers.

    Args:
        shape: Voxels of the answer.
        classes: K.
        surface: Voxels at surfaces that are expected.
    """
    # Logits, a copy that is partly sorted, one that is masked; places as int32, int64 and float32.
    each = 3 * 4 * max(classes, 1) + 3 * (4 + 8 + 4)
    questions = question_locations(classes) * each
    # A structure can hardly have more surface than a tenth of the scan.
    lists = int(_SURFACE_BYTES * min(surface, 0.1 * prod(shape)))
    return label_bytes(shape, classes) + questions + lists


def lattice_bytes(sites: Shape, asked: Shape | None = None) -> int:
    """What it takes to begin with a whole lattice: labels of its sites, margins and indices of those that are asked.

    Args:
        sites: Of the lattice, along each axis.
        asked: Those in a region; None: all.
    """
    return prod(sites) + (_SITE_BYTES - 1) * prod(asked or sites)


def affords_lattice(grant: int | None, sites: Shape) -> bool:
    """Whether a grant leaves a quarter to a whole lattice; otherwise all voxels are asked, slab by slab."""
    return grant is None or 4 * lattice_bytes(sites) <= grant


def require(grant: int | None, needed: int | float, what: str) -> None:
    """Refuse what a grant cannot hold, before anything is done.

    Raises:
        ResourceError: Says how much is needed.
    """
    if grant is not None and needed > grant:
        raise ResourceError(
            f"{format_size(grant)} of memory are granted, at least {format_size(needed)} are needed for {what}."
        )


def halving(
    work: Callable[[int], Result], size: int, smallest: int, what: str = "locations"
) -> tuple[Result, int]:
    """`work(size)`, with half the size after each refusal of memory.

    Returns:
        The result, and the size that it took.

    Raises:
        ResourceError: If memory is refused at the smallest size.
    """
    while True:
        try:
            return work(size), size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size <= smallest:
                raise ResourceError(
                    f"Memory ran out with {size} {what} at once. Close other programs, or use less."
                ) from error
        # Outside the handler: the traceback holds the tensors of the failed attempt.
        size = max(size // 2, smallest)
        warnings.warn(f"memory ran out; going on with {size} {what} at once", MemoryNotice, stacklevel=3)
