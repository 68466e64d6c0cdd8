"""The Triton kernel on 8-bit operands: INT8 scores, and INT8 or FP8 values where asked for.

Chosen by name for calls that ask for nothing, the mean key is taken out first, which changes no
softmax weight and leaves less to round. For calls that ask for few-bit products themselves (see
`AttentionCall.quantize`) it is not: the plain-torch specification is in `quantised.py`, and weights
differ from it in their scale, a constant against the running row maximum. Queries and keys have one
scale per block, values one per channel. The tensors are written anew anyway, so the token order is
applied there, and the kernel only scatters the output.

Source: arXiv:2410.02367 (smoothed keys, INT8 scores), arXiv:2411.10958 (FP8 values),
arXiv:2506.16054 (groups of blocks after reordering).
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.kernels.common import check_fit, dense_attention, to_slots
from dittools.kernels.program import Program, program
from dittools.kernels.triton_backend import TritonBackend
from dittools.kernels.triton_block_sparse import constants, run_kernel
from dittools.kernels.triton_config import capability_of, default_config
from dittools.kernels.triton_tiles import INTERPRETED
from dittools.mask import BlockMask

Values = Literal["half", "int8", "fp8"]
WANTED = {"half": "int8_half", "int8": "int8", "fp8": "int8_fp8"}  # what a call may ask of it
P_RANGE = {"half": 0, "int8": 127, "fp8": 448}  # what a weight of 1 becomes; 0 leaves values alone
FP8_MAX = 448.0


class Quantised(NamedTuple):
    """One call in 8 bits, in slot order; [B, slots, H, D] views."""

    query: torch.Tensor  # int8
    key: torch.Tensor  # int8, mean taken out
    value: torch.Tensor  # as it came, int8 or float8_e4m3fn
    q_scale: torch.Tensor  # float32 [B, H, q_blocks]
    k_scale: torch.Tensor  # float32 [B, H, kv_blocks]
    v_scale: torch.Tensor | None  # float32 [B, H, D]
    bias: torch.Tensor | None  # float32 [B or 1, H or 1, key slots]
    lse_shift: torch.Tensor  # float32 [B, S, H], what taking the mean out took from the scores


def quantise(call: AttentionCall, mask: BlockMask, values: Values = "half") -> Quantised:
    """Return the 8-bit form of a call in the slots of a mask."""
    slots = to_slots(call, mask)
    mean = call.key.float().mean(dim=1)  # [B, H, D]; any vector would do, the mean leaves least
    if call.quantize != "none":
        mean = torch.zeros_like(mean)  # the specification rounds keys as they are
    query, q_scale = _per_block(slots.query.float(), mask.q_block)
    key, k_scale = _per_block(slots.key.float() - mean[:, :, None], mask.kv_block)
    value, v_scale = slots.value, None
    if values != "half":
        most = 127.0 if values == "int8" else FP8_MAX
        v_scale = value.float().abs().amax(dim=2).clamp(min=1e-12) / most
        scaled = value.float() / v_scale[:, :, None]
        value = (
            scaled.round().to(torch.int8) if values == "int8" else scaled.to(torch.float8_e4m3fn)
        )
    shift = torch.einsum("bshd,bhd->bsh", call.query.float(), mean) * call.softmax_scale
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return Quantised(query, key, value, q_scale, k_scale, v_scale, slots.bias, shift)


def _per_block(tensor: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [B, H, blocks * block, D] and one scale per block, symmetric around 0."""
    padded = F.pad(tensor, (0, 0, 0, -tensor.shape[2] % block)).unflatten(2, (-1, block))
    scale = padded.abs().amax(dim=(3, 4)).clamp(min=1e-12) / 127
    return (padded / scale[..., None, None]).round().to(torch.int8).flatten(2, 3), scale


def launch_quantised(
    call: AttentionCall, made: Program, eight: Quantised, values: Values
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, S, H, D] in the dtype of call.query and the log-sum-exp float32 [B, S, H]."""
    query = call.query
    config = default_config(
        query.shape[-1], made.q_block, made.kv_block, torch.bfloat16,
        masked=made.masked, capability=capability_of(query.device),
    )  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    fixed = constants(made, query, config, bias=eight.bias is not None, slots=True)
    upcast = fixed["UPCAST"] or (INTERPRETED and values == "fp8")
    fixed |= {"QUANT": True, "P_RANGE": P_RANGE[values], "UPCAST": upcast}
    run_kernel(
        eight.query, eight.key, eight.value, out, lse, made, eight.bias, call.softmax_scale, config,
        fixed, (eight.q_scale, eight.k_scale, eight.v_scale),
    )  # fmt: skip
    return out, lse + eight.lse_shift


class QuantisedBackend:
    """INT8 scores in the block-sparse kernel; by name only, since its results are not exact.

    Args:
        values: "half" leaves values and weights as they are, "int8" and "fp8" round them too.
    """

    def __init__(self, values: Values = "half") -> None:
        """Choose how values are stored."""
        self.values: Values = values
        self.name = "triton_int8" if values == "half" else f"triton_int8_{values}"
        self._exact = TritonBackend()

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """What the exact kernel refuses, and head and block sizes 8-bit products cannot have."""
        reasons = self._exact.not_supported(replace(call, quantize="none"), mask)
        if call.quantize not in ("none", WANTED[self.values]):
            reasons.append(f"{self.name} runs {WANTED[self.values]}, the call asks {call.quantize}")
        if call.query.shape[-1] <= 16:
            reasons.append(f"8-bit products need head_dim above 16, got {call.query.shape[-1]}")
        if call.query.dtype == torch.float32:
            reasons.append("8-bit attention takes float16 or bfloat16, got torch.float32")
        if self.values == "fp8" and capability_of(call.query.device) < 89:
            reasons.append("FP8 values need compute capability 8.9 or newer")
        if mask is not None and self.values != "half" and mask.kv_block % 32:
            reasons.append(f"8-bit values need key blocks of a multiple of 32, got {mask.kv_block}")
        return reasons

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """As the exact kernel; never for calls that ask for few-bit products."""
        return call.quantize == "none" and self._exact.prefers_dense(call, mask)

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: attention over all keys, not quantised."""
        return dense_attention(call)

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend over the kept pairs with 8-bit products; a query that keeps nothing gets 0, -inf.

        Raises:
            UnsupportedCall: the call does not fit.
        """
        check_fit(call, mask)
        reasons = self.not_supported(call, mask)
        if reasons:
            raise UnsupportedCall(
                f"backend {self.name} cannot run this call", got=", ".join(reasons)
            )
        eight = quantise(call, mask.to(call.query.device), self.values)
        out, lse = launch_quantised(call, program(mask, call), eight, self.values)
        return (out, lse) if return_lse else out


def int8_backend() -> QuantisedBackend:
    """Return INT8 scores with values as they are."""
    return QuantisedBackend("half")


def int8_values_backend() -> QuantisedBackend:
    """Return INT8 scores and INT8 values."""
    return QuantisedBackend("int8")


def fp8_values_backend() -> QuantisedBackend:
    """Return INT8 scores and FP8 values."""
    return QuantisedBackend("fp8")
