"""Which rows of a denoiser's batch carry the prompt, and the arguments of those rows alone."""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch

from dittools.errors import UnsupportedCall

LATENTS = ("hidden_states", "sample", "x")
_SHARED = ("image_rotary_emb", "img_ids", "txt_ids")  # their first axis never counts rows
_FLAG = "do_classifier_free_guidance"


class Rows(NamedTuple):
    """The rows of one forward.

    Attributes:
        total: rows of the batch.
        cond: those with the prompt.
        copies: 2 when rows without the prompt are in the same batch, else 1.
        is_list: samples come as a list, one entry a row.
    """

    total: int
    cond: slice
    copies: int
    is_list: bool


def rows_of(arguments: Mapping[str, Any], order: tuple[str, ...], pipe: Any) -> Rows:
    """Return the rows of a forward.

    Args:
        arguments: of the forward, by name.
        order: halves of a batch with classifier-free guidance, ("uncond", "cond") or the other way
            round; empty for families that call the denoiser once per branch.
        pipe: says whether it guides; None when only the denoiser is known.
    Raises:
        UnsupportedCall: the pipeline guides, but the batch is not two copies of the same latents.
    """
    latents: Any = next((arguments[n] for n in LATENTS if arguments.get(n) is not None), None)
    is_list = isinstance(latents, (list, tuple))
    total = len(latents) if latents is not None else 0
    alone = Rows(total, slice(None), 1, is_list)
    says = _guides(pipe) if order else False
    if not order or says is False or total == 0:
        return alone
    half = total // 2
    if total % 2 == 0 and _equal(latents[:half], latents[half:], is_list):
        start = half * order.index("cond")
        return Rows(total, slice(start, start + half), 2, is_list)
    if says and order[0] == "uncond":
        raise UnsupportedCall(
            "the pipeline guides, but its batch is not [without prompt, with prompt]",
            expected="two copies of the same latents",
            got=f"{total} rows",
        )
    return alone  # a denoiser on its own, or a step in which guidance is cut short


def take(value: Any, rows: Rows, name: str) -> Any:
    """Return an argument for the rows with the prompt; what has no rows stays whole."""
    if rows.copies == 1 or name in _SHARED:
        return value
    if isinstance(value, torch.Tensor):
        return value[rows.cond] if value.dim() and value.shape[0] == rows.total else value
    if isinstance(value, Mapping):
        return type(value)({key: take(item, rows, str(key)) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        if rows.is_list and len(value) == rows.total:
            return value[rows.cond]
        return type(value)(take(item, rows, name) for item in value)
    return value


def _equal(one: Any, other: Any, is_list: bool) -> bool:
    """Whether two halves of the latents are the same; waits for the device."""
    if is_list:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other)


def _guides(pipe: Any) -> bool | None:
    """Return whether a pipeline runs classifier-free guidance now, None when it cannot be told.

    Some pipelines keep that in a local variable of `__call__`; it is read there, in this thread.
    """
    if pipe is None:
        return None
    known = getattr(pipe, _FLAG, None)
    if isinstance(known, bool):
        return known
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            told = frame.f_locals.get(_FLAG)
            return told if isinstance(told, bool) else None
        frame = frame.f_back
    return None
