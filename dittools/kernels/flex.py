"""FlexAttention as a backend: the same mask, compiled by torch itself.

Unlike the other backends it lets a NaN or inf of a value reach queries that drop it, where another
query of the same block keeps it.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.flex_mask import flex_block_mask
from dittools.kernels.common import (
    dense_attention,
    exact_only,
    from_slots,
    misfit,
    to_slots,
)
from dittools.mask import DENSE_LIMIT, BlockMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DENSE_ABOVE = 0.5  # share of blocks; on CPU, where it was timed, it takes 3 times the ideal in fp32


class FlexBackend:
    """Runs the mask through FlexAttention, reordering the tensors first.

    Args:
        compiled: compile the kernel. None: on CUDA, and on CPU where a C++ compiler is found; the
            eager form builds every score and serves small sequences only.
    """

    name = "flex"

    def __init__(self, compiled: bool | None = None) -> None:
        """Choose the form; nothing is compiled before the first call."""
        self.compiled = compiled
        self._masks: WeakKeyDictionary[BlockMask, dict[tuple[torch.device, int, int], FlexMask]]
        self._masks = WeakKeyDictionary()

    def _compiles(self, call: AttentionCall) -> bool:
        if self.compiled is not None:
            return self.compiled
        return call.query.device.type == "cuda" or shutil.which("g++") is not None

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Device, dtype, head size; then whether the mask fits and its blocks suit the kernel."""
        query, reasons = call.query, exact_only(self.name, call)
        device, head_dim = query.device.type, query.shape[-1]
        if device not in ("cpu", "cuda"):
            reasons.append(f"flex runs on cpu and cuda here, got {device}")
        if query.dtype not in DTYPES:
            reasons.append(f"flex takes float16, bfloat16 or float32, got {query.dtype}")
        if device == "cuda" and head_dim < 16:
            reasons.append(f"flex needs head_dim of 16 or more on cuda, got {head_dim}")
        tensors = (query, call.key, call.value)
        if device == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            reasons.append("flex has no backward pass on the CPU")
        longest = max(query.shape[1], call.key.shape[1])
        if not self._compiles(call) and longest > DENSE_LIMIT:
            reasons.append(
                f"flex without a C++ compiler builds every score, at most {DENSE_LIMIT} tokens,"
                f" got {longest}"
            )
        if mask is not None:
            reasons += misfit(call, mask)
            if device == "cuda" and (mask.q_block % 16 or mask.kv_block % 16):
                reasons.append(
                    f"flex needs blocks of a multiple of 16, got {mask.q_block} x {mask.kv_block}"
                )
        return reasons

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Whether so many blocks are computed that a dense kernel should win."""
        return mask.computed > DENSE_ABOVE

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: attention over all keys."""
        return dense_attention(call)

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend over the kept pairs only; a query that keeps nothing gets 0 and -inf.

        Args:
            call: query, key, value are [B, S, H, D].
            mask: must cover the call's slots.
            return_lse: also return the log-sum-exp, float32 [B, S, H].
        Raises:
            UnsupportedCall: the mask was made for another size, or the log-sum-exp is asked of the
                compiled CPU form, which has none.
        """
        compiled = self._compiles(call)
        if return_lse and compiled and call.query.device.type == "cpu":
            raise UnsupportedCall(
                "compiled FlexAttention on CPU returns no log-sum-exp",
                remedy="the cpu or reference backend",
            )
        slots = to_slots(call, mask)
        options = _kernel_options(mask) if call.query.device.type == "cuda" else None
        run = _compiled() if compiled else cast(Callable[..., Any], flex_attention)
        out, aux = run(
            slots.query,
            slots.key,
            slots.value,
            score_mod=_bias_mod(slots.bias),
            block_mask=self._flex_mask(mask, call),
            scale=call.softmax_scale,
            kernel_options=options,
            return_aux=AuxRequest(lse=return_lse),
        )
        result = from_slots(out, mask)
        return (result, from_slots(aux.lse[..., None], mask)[..., 0]) if return_lse else result

    def _flex_mask(self, mask: BlockMask, call: AttentionCall) -> FlexMask:
        made = self._masks.setdefault(mask, {})
        wanted = (call.query.device, call.query.shape[1], call.key.shape[1])
        if wanted not in made:
            there = mask.to(wanted[0])
            made[wanted] = flex_block_mask(
                replace(there, q_tokens=wanted[1], kv_tokens=wanted[2], _cache={})
            )
        return made[wanted]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _bias_mod(bias: torch.Tensor | None) -> Callable[..., torch.Tensor] | None:
    if bias is None:
        return None
    line, batches, heads = bias, bias.shape[0] > 1, bias.shape[1] > 1

    def add(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return score + line[b if batches else b * 0, h if heads else h * 0, k]

    return add


def _kernel_options(mask: BlockMask) -> dict[str, int]:
    """Tiles that divide the mask's blocks; the library's own choice may not."""
    return {
        "BLOCK_M": min(128, mask.q_block & -mask.q_block),
        "BLOCK_N": min(64, mask.kv_block & -mask.kv_block),
    }
