"""What the machine computes fast, and how to have it computed exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock

import torch

_FLAGS = RLock()
"""Held while the flags of cuDNN are others than the caller's: all threads share them."""


@cache
def fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 products are faster than float32 ones: recent server processors and GPUs."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """What a precision ("fp32", "bf16" or "auto") is on a device."""
    return precision == "bf16" or (precision == "auto" and fast_bf16(device))


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Meanwhile convolutions of float32 are computed in it: on a GPU they round what they read to TF32's 10 bits.

    There one thread at a time: the flags are of all threads, and one that begins meanwhile would keep them as they are
    now for what the caller chose.
    """
    if device.type != "cuda":
        yield
        return
    chosen = torch.backends.cudnn
    # What the caller chose otherwise stays; by itself `flags` sets everything.
    with (
        _FLAGS,
        chosen.flags(chosen.enabled, chosen.benchmark, deterministic=chosen.deterministic, allow_tf32=False),
    ):
        yield
