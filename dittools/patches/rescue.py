"""Dense attention in place of a sparse call that failed, in pieces where memory is short."""

import gc
import traceback
from collections.abc import Sequence
from dataclasses import replace

import torch

from dittools.patches.perturb import repeated, select_heads
from dittools.patches.sites import SeamCall

PIECES = (1, 8, 64)  # of the queries; dense attention of a piece needs no more than its share


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def free(error: BaseException, device: torch.device) -> None:
    """Let go of what a failed call still holds, and of cached device memory."""
    traceback.clear_frames(error.__traceback__)  # locals of its frames, workspaces among them
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def stock_heads(call: SeamCall, heads: Sequence[int]) -> tuple[torch.Tensor, int]:
    """Return [B, S, heads, D] as the stock pipeline computes it, and in how many pieces.

    Args:
        call: any call a method may run.
        heads: ascending places in it.
    Raises:
        Exception: what the stock function raises, when memory is too short for a 64th of the
            queries, or for another reason.
    """
    some = select_heads(repeated(call), tuple(heads))
    for pieces in PIECES:
        try:
            out = _in_pieces(some, pieces)
        except Exception as error:
            if not is_out_of_memory(error) or pieces == PIECES[-1]:
                raise
            free(error, call.query.device)
        else:
            return (out.transpose(1, 2) if call.heads_first else out), pieces
    raise AssertionError("the last number of pieces either returns or raises")


def _in_pieces(call: SeamCall, pieces: int) -> torch.Tensor:
    """Return dense attention in the layout of the call, some queries at a time."""
    if pieces == 1:
        return call.dense()
    axis = 2 if call.heads_first else 1
    tokens = call.query.shape[axis]
    mask = call.options.get("attn_mask")
    least = 2 if call.heads_first else 3  # to the dispatcher, [B, keys] is a mask as well
    by_query = mask is not None and mask.dim() >= least and mask.shape[-2] == tokens > 1
    out = []
    each = -(-tokens // pieces)
    for start in range(0, tokens, each):
        size = min(each, tokens - start)
        options = dict(call.options)
        if mask is not None and by_query:
            options["attn_mask"] = mask.narrow(-2, start, size)
        query = call.query.narrow(axis, start, size)
        out.append(replace(call, query=query, options=options).dense())
    return torch.cat(out, axis)
