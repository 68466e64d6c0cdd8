"""The Triton kernel as a backend: CUDA tensors, or any tensors under Triton's interpreter."""

import math

import torch

from dittools.call import AttentionCall
from dittools.kernels.common import check_fit, dense_attention, exact_only, misfit
from dittools.kernels.program import program
from dittools.kernels.triton_block_sparse import launch
from dittools.kernels.triton_tiles import INTERPRETED
from dittools.mask import BlockMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
DENSE_ABOVE = (
    0.7  # share of blocks; a modelled break-even against cuDNN, `make bench-gpu` measures it
)


class TritonBackend:
    """Runs the program in one kernel; its work is in proportion to the kept blocks."""

    name = "triton"

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Device, dtype, head size, scale, gradients; then whether the mask fits."""
        query, reasons = call.query, exact_only(self.name, call)
        if query.device.type != "cuda" and not INTERPRETED:
            reasons.append(f"the triton kernel needs CUDA tensors, got {query.device.type}")
        elif query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (
            8,
            0,
        ):
            reasons.append("the triton kernel needs compute capability 8.0 or newer")
        if query.dtype not in DTYPES:
            reasons.append(
                f"the triton kernel takes float16, bfloat16 or float32, got {query.dtype}"
            )
        if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
            reasons.append(f"head_dim is at most {MAX_HEAD_DIM}, got {query.shape[-1]}")
        if not (call.softmax_scale > 0 and math.isfinite(call.softmax_scale)):
            reasons.append(f"the scale must be positive and finite, got {call.softmax_scale}")
        tensors = (query, call.key, call.value)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            reasons.append("the triton kernel has no backward pass")
        if mask is not None:
            reasons += misfit(call, mask)
            if mask.q_block % 16 or mask.kv_block % 16:
                reasons.append(
                    f"block sizes are multiples of 16, got {mask.q_block} x {mask.kv_block}"
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
            call: query, key, value are [B, S, H, D] with any strides.
            mask: must cover the call's slots, in blocks of a multiple of 16 tokens.
            return_lse: also return the log-sum-exp, float32 [B, S, H].
        Raises:
            UnsupportedCall: the mask was made for another size.
        """
        check_fit(call, mask)
        made, bias = program(mask, call), call.additive_mask()
        tensors = (call.query, call.key, call.value)
        if INTERPRETED:
            out, lse = launch(*tensors, made, bias, call.softmax_scale)
        else:
            out, lse = made(*tensors, bias, call.softmax_scale)
        return (out, lse) if return_lse else out
