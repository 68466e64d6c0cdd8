"""Rotary position embedding, read off a query before and after it.

RoPE turns pairs of channels by an angle that depends on the token's position alone. Both forms of
the same query give that angle, whatever the model's own rule is: the phase of after / before, with
the pairs as complex numbers. At the centre of a cell it is the phase of the mean over the cell, as
angles grow evenly along each axis and by less than pi over a cell.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dittools.errors import UnsupportedCall

_TOLERANCE = 0.05  # of the length of a pair; bf16 rounds to 0.004


class Phases(NamedTuple):
    """What turns a vector as RoPE would at some places.

    Attributes:
        real: float [1, m, 1, D / 2], cosines; imaginary: sines; None for no rotation at all.
        is_interleaved: pairs are channels (2 i, 2 i + 1), else (i, i + D / 2).
    """

    real: torch.Tensor | None
    imaginary: torch.Tensor | None
    is_interleaved: bool


def centre_phases(
    before: torch.Tensor, after: torch.Tensor, mean: Callable[[torch.Tensor], torch.Tensor]
) -> Phases:
    """Return the phases at the centres of cells.

    Args:
        before: query before RoPE, [B, N, H, D].
        after: the same query after it.
        mean: takes [1, N, 1, D / 2] to the means over cells.
    Raises:
        UnsupportedCall: `after` is no rotation of `before` in pairs of channels.
    """
    if torch.equal(before, after):
        return Phases(None, None, True)
    before, after = before.float(), after.float()
    errors = {kind: _error(before, after, kind) for kind in (True, False)}
    kind = min(errors, key=lambda k: errors[k])
    if before.shape[-1] % 2 or not errors[kind] <= _TOLERANCE:
        raise UnsupportedCall(
            "agent cannot follow how this model turns its queries",
            expected="rotary position embedding over pairs of channels",
        )
    x, y = _pairs(before, kind)
    u, v = _pairs(after, kind)
    real = (u * x + v * y).sum((0, 2), keepdim=True)  # after times conjugate of before
    imaginary = (v * x - u * y).sum((0, 2), keepdim=True)
    length = torch.hypot(real, imaginary).clamp(min=1e-20)
    real, imaginary = mean(real / length), mean(imaginary / length)
    length = torch.hypot(real, imaginary).clamp(min=1e-20)
    return Phases(real / length, imaginary / length, kind)


def turn(vectors: torch.Tensor, phases: Phases) -> torch.Tensor:
    """Return vectors [B, m, H, D] turned."""
    if phases.real is None or phases.imaginary is None:
        return vectors
    x, y = _pairs(vectors, phases.is_interleaved)
    u = x * phases.real - y * phases.imaginary
    v = y * phases.real + x * phases.imaginary
    if phases.is_interleaved:
        return torch.stack((u, v), -1).flatten(-2)
    return torch.cat((u, v), -1)


def _pairs(vectors: torch.Tensor, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if is_interleaved:
        return vectors[..., 0::2], vectors[..., 1::2]
    half = vectors.shape[-1] // 2
    return vectors[..., :half], vectors[..., half : 2 * half]


def _error(before: torch.Tensor, after: torch.Tensor, is_interleaved: bool) -> float:
    """Return how far pairs are from keeping their length, relative to it."""
    if before.shape[-1] % 2:
        return float("inf")
    one, other = (torch.hypot(*_pairs(t, is_interleaved)) for t in (before, after))
    return float((one - other).norm() / one.norm().clamp(min=1e-20))
