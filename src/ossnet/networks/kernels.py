"""Padé units with what surrounds them, in one pass over memory where the machine can.

Three ways with the same results up to rounding: the compiled loops of `native.c` (CPU with a C compiler), a
function compiled by torch (CUDA, once that pays), tensor operations on cache-sized pieces (everywhere else). Always
computed in float32; bfloat16 is rounded once. None of these is seen by autograd: `networks.lean_pade` adds the
derivatives.

Letters: V volumes, N locations, F features.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ossnet.networks.native import library
from ossnet.networks.pade import Pade, magnitude, pade

Result = TypeVar("Result")

_PIECE = 128
"""Rows a tensor operation works on at once: 256 rows of 512 features stay in a core's cache."""
_NATIVE = {torch.float32: "f32", torch.bfloat16: "bf16"}


def coefficients(numerator: Float[Tensor, "6"], denominator: Float[Tensor, "4"]) -> Float[Tensor, "10"]:
    """n_0 … n_5, |d_0| … |d_3| in float32, on the device of the unit."""
    return torch.cat([numerator.detach(), magnitude(denominator.detach())]).float()


def coefficients_of(unit: nn.Module) -> Float[Tensor, "10"]:
    """`coefficients` of a `Pade`."""
    learnt = cast(Pade, unit)
    return coefficients(learnt.weight_numerator, learnt.weight_denominator)


def pade_(x: Float[Tensor, "*shape"], c: Float[Tensor, "10"]) -> Float[Tensor, "*shape"]:
    """P of each value, in place; `c` from `coefficients`."""
    function = _function("ossnet_pade", x)
    if function is not None and _dense(x):
        function(x.data_ptr(), x.data_ptr(), x.numel(), c.data_ptr(), torch.get_num_threads())
        return x
    if x.device.type != "cpu":
        return x.copy_(_compiled_pade(x, c.to(x.device)))
    if not x.is_contiguous():
        return x.copy_(pade(x, c[:6], c[6:]))
    flat = x.view(-1)
    for start in range(0, len(flat), 1 << 17):
        piece = flat[start : start + (1 << 17)]
        _horner(piece if piece.dtype == torch.float32 else piece.float(), c, piece)
    return x


def pade_of(x: Float[Tensor, "*shape"], c: Float[Tensor, "10"]) -> Float[Tensor, "*shape"]:
    """P of each value as a new tensor."""
    if x.device.type != "cpu":
        return _compiled_pade(x, c.to(x.device))
    function = _function("ossnet_pade", x)
    if function is None or not _dense(x):
        return pade_(x.clone(), c)
    out = torch.empty_like(x)
    function(x.data_ptr(), out.data_ptr(), x.numel(), c.data_ptr(), torch.get_num_threads())
    return out


def affine_pade(
    x: Float[Tensor, "V N F"],
    scale: Float[Tensor, "V F"] | None,
    shift: Float[Tensor, "V F"],
    skip: Float[Tensor, "V N F"] | None,
    c: Float[Tensor, "10"],
    out: Float[Tensor, "V N F"] | None = None,
) -> Float[Tensor, "V N F"]:
    """P(x · scale + shift + skip), float32 inside.

    Args:
        x, skip: Rows of F values; rows may lie apart when V = 1.
        scale, shift: float32, contiguous.
        c: From `coefficients`.
        out: Where to write, laid out as `x`, possibly `x` itself; None for a new tensor.
    """
    volumes, rows, features = x.shape
    if x.device.type != "cpu":
        fresh = _compiled_affine_pade(x, scale, shift, skip, c.to(x.device))
        return fresh if out is None else out.copy_(fresh)
    out = torch.empty_like(x) if out is None else out
    function = _function("ossnet_affine_pade", x)
    if function is not None and _alike(x, skip, out):
        function(
            x.data_ptr(), _pointer(skip), _pointer(scale), shift.data_ptr(), out.data_ptr(),
            volumes * rows, features, x.stride(1), rows, c.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out
    scratch = torch.empty(3, min(_PIECE, rows), features)
    for v in range(volumes):
        for start in range(0, rows, _PIECE):
            piece = slice(start, min(start + _PIECE, rows))
            from_, to = x[v, piece], out[v, piece]
            if x.dtype == torch.float32:
                z = to
            else:
                # Converted by itself: mixed types in one operation are not vectorised.
                from_ = z = scratch[2, : len(to)].copy_(from_)
            if scale is None:
                torch.add(from_, shift[v], out=z)
            else:
                torch.addcmul(shift[v], from_, scale[v], out=z)
            if skip is not None:
                z.add_(skip[v, piece])
            _horner(z, c, to, scratch[:2, : len(z)])
    return out


def affine_pade_backward(
    gradient: Float[Tensor, "V N F"],
    x: Float[Tensor, "V N F"],
    scale: Float[Tensor, "V F"] | None,
    shift: Float[Tensor, "V F"] | None,
    skip: Float[Tensor, "V N F"] | None,
    c: Float[Tensor, "10"],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of `affine_pade` (shift None stands for 0) from that of its result.

    Returns:
        Those of x, scale (V, F), shift (V, F) (both float64), skip, and of the ten values of `coefficients`
        (float32). None for what is None.
    """
    if x.device.type != "cpu":
        return _compiled_affine_pade_backward(gradient, x, scale, shift, skip, c.to(x.device))
    volumes, rows, features = x.shape
    function = _function("ossnet_affine_pade_backward", x)
    if function is None or (skip is not None and scale is None):
        return _affine_pade_backward(gradient, x, scale, shift, skip, c)
    gradient, x = gradient.to(x.dtype).contiguous(), x.contiguous()
    skip = None if skip is None else skip.to(x.dtype).contiguous()
    d_x = torch.empty_like(x)
    d_skip = None if skip is None else torch.empty_like(x)
    d_affine = torch.zeros(2, volumes, features, dtype=torch.float64)
    d_c = torch.zeros(10, dtype=torch.float64)
    failed = function(
        gradient.data_ptr(), x.data_ptr(), _pointer(skip), _pointer(scale), _pointer(shift), d_x.data_ptr(),
        _pointer(d_skip), d_affine[0].data_ptr(), d_affine[1].data_ptr(), d_c.data_ptr(),
        volumes, rows, features, c.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("out of memory in the backward pass of a Padé unit")
    if scale is None:
        return d_x, None, None, d_skip, d_c.float()
    return d_x, d_affine[0], d_affine[1], d_skip, d_c.float()


def _horner(z: Tensor, c: Tensor, out: Tensor, scratch: Tensor | None = None) -> None:
    """P(z) into `out`; z is float32 and may be `out`. Eleven passes."""
    top, bottom = torch.empty_like(z.expand(2, *z.shape)) if scratch is None else scratch
    n0, n1, n2, n3, n4, n5, d0, d1, d2, d3 = c.unbind()
    torch.add(n4, z, alpha=float(n5), out=top)
    for value in (n3, n2, n1, n0):
        torch.addcmul(value, z, top, out=top)
    size = torch.abs(z, out=z)
    torch.add(d2, size, alpha=float(d3), out=bottom)
    for value in (d1, d0, torch.ones(())):
        torch.addcmul(value, size, bottom, out=bottom)
    if out.dtype == torch.float32:
        torch.div(top, bottom, out=out)
    else:
        out.copy_(top.div_(bottom))


def _affine_pade(x: Tensor, scale: Tensor | None, shift: Tensor, skip: Tensor | None, c: Tensor) -> Tensor:
    z = x.float() + shift[:, None] if scale is None else x.float() * scale[:, None] + shift[:, None]
    if skip is not None:
        z = z + skip
    return pade(z, c[:6], c[6:]).to(x.dtype)


def _affine_pade_backward(
    gradient: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, skip: Tensor | None, c: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    z = x.float()
    if scale is not None and shift is not None:
        z = z * scale[:, None] + shift[:, None]
    if skip is not None:
        z = z + skip
    size = z.abs()
    over = 1 / (1 + size * (c[6] + size * (c[7] + size * (c[8] + size * c[9]))))
    top = c[0] + z * (c[1] + z * (c[2] + z * (c[3] + z * (c[4] + z * c[5]))))
    slope = c[1] + z * (2 * c[2] + z * (3 * c[3] + z * (4 * c[4] + z * (5 * c[5]))))
    fall = c[6] + size * (2 * c[7] + size * (3 * c[8] + size * (4 * c[9])))
    p = top * over
    weight = gradient * over
    dz = weight * (slope - p * z.sign() * fall)
    d_c = []
    for _ in range(6):
        d_c.append(weight.sum())
        weight = weight * z
    down = -gradient * over * p
    for _ in range(4):
        down = down * size
        d_c.append(down.sum())
    d_skip = None if skip is None else dz.to(skip.dtype)
    if scale is None:
        return dz.to(x.dtype), None, None, d_skip, torch.stack(d_c)
    d_scale, d_shift = (dz * x).sum(1, dtype=torch.float64), dz.sum(1, dtype=torch.float64)
    return (dz * scale[:, None]).to(x.dtype), d_scale, d_shift, d_skip, torch.stack(d_c)


def _function(name: str, x: Tensor) -> Callable[..., Any] | None:
    if x.device.type != "cpu" or x.dtype not in _NATIVE:
        return None
    loaded = library()
    return None if loaded is None else getattr(loaded, f"{name}_{_NATIVE[x.dtype]}")


def _dense(x: Tensor) -> bool:
    """True when the values lie one after the other, in whatever order."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """The layouts that the compiled loops take: rows without holes, at equal distances in all tensors."""
    if x.stride(2) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        return False
    return all(o is None or (o.dtype == x.dtype and o.stride() == x.stride()) for o in others)


_ENOUGH = 1 << 37
"""Values after which compiling would have paid: it takes 10 s or more (H200 and its host), in which the tensor
operations, about 290 bytes of traffic a value, do as many. A few scans never come to it, a training soon does."""


def _compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, after `_ENOUGH` values compiled by torch for a GPU; as it is where that does not work."""
    state: dict[str, Callable[..., Result]] = {}
    done = 0

    @functools.wraps(function)
    def run(x: Tensor, *rest: Any) -> Result:
        nonlocal done
        if "chosen" in state:
            return state["chosen"](x, *rest)
        done += x.numel()
        if done < _ENOUGH or _capturing():
            return function(x, *rest)
        compiled = torch.compile(function, dynamic=True)
        try:
            answer: Result = compiled(x, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a toolchain may say, the tensor operations work
            warnings.warn(f"torch cannot compile here, going on without: {error}", stacklevel=2)
            state["chosen"] = function
            return function(x, *rest)
        state["chosen"] = compiled
        return answer

    return run


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing can be compiled then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_compiled_affine_pade = _compiled(_affine_pade)
_compiled_affine_pade_backward = _compiled(_affine_pade_backward)
_compiled_pade = _compiled(lambda x, c: pade(x, c[:6], c[6:]))
