"""The CPU backend: the native kernel, or gathered blocks and SDPA where that cannot run."""

import math

import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.kernels import native
from dittools.kernels.common import (
    dense_attention,
    exact_only,
    from_slots,
    misfit,
    to_slots,
)
from dittools.kernels.cpu_grouped import grouped_attention
from dittools.mask import BlockMask

# Computed share up to which sparse beats dense SDPA, by the size of the dense call in multiply-adds
# of one product (B * H * S * S_k * D): rows of (size below which the share holds, share).
# Measured with `bench/kernels.py --threads 2` on two Xeon cores with AVX-512 and AMX, torch
# 2.13, 64 to 4,096 tokens, head_dim 64 and 128; the AVX2 rows with ATEN_CPU_CAPABILITY,
# ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS set to AVX2. Time over dense at share .5 / 1:
#   native fp32  128 tokens .71-.90 / .97-1.12, 256 .62 / .93-.99, 4,096 .41-.46 / .80-.91
#   native fp32 AVX2  256 tokens .6 / 1.02, 4,096 .52 / 1.01-1.04
#   native bf16 with AMX  256 tokens .96-1.02 / 1.03-1.22, 512 .61-.67 / .81, 4,096 .32-.37 / .6-.69
#   native bf16, kernel without AMX, torch with it  4,096 tokens, share .25: .63-.91
#   grouped, share .25: fp32 512 tokens .78, 4,096 (.31) .61-.71; bf16 512 1.3, 4,096 (.31) .73-.93
_SMALL = 10e6
_BREAK_EVEN: dict[str, tuple[tuple[float, float], ...]] = {
    "native": ((2e6, 0.0), (_SMALL, 0.75), (math.inf, 1.0)),
    "native avx2": ((2e6, 0.0), (_SMALL, 0.75), (math.inf, 0.95)),
    "native amx": ((_SMALL, 0.0), (25e6, 0.75), (math.inf, 1.0)),
    "native without amx": ((200e6, 0.0), (math.inf, 0.25)),
    "grouped": ((_SMALL, 0.0), (math.inf, 0.35)),
    "grouped bf16": ((200e6, 0.0), (math.inf, 0.25)),
}


class CpuBackend:
    """Runs on the CPU in time proportional to the mask's computed share."""

    name = "cpu"

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Refuse tensors elsewhere, dtypes that are not floating-point, masks of another size."""
        reasons = exact_only(self.name, call)
        if call.query.device.type != "cpu":
            reasons.append(f"tensors are on {call.query.device}, not on the CPU")
        if not call.query.is_floating_point():
            reasons.append(f"dtype {call.query.dtype} is not a floating-point type")
        return reasons + ([] if mask is None else misfit(call, mask))

    def not_native(self, call: AttentionCall, mask: BlockMask) -> list[str]:
        """Say why this call takes the grouped torch path; empty when it runs natively."""
        status = native.status()
        reasons = [] if status.available else [status.reason]
        return reasons + native.not_supported(call, mask)

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Whether dense attention would be at least as fast, from a measured table."""
        batch, queries, heads, dim = call.query.shape
        keys = call.key.shape[1]
        size = batch * heads * queries * keys * dim
        rows = _BREAK_EVEN[self._speed_class(call, mask)]
        share = next(share for below, share in rows if size < below)
        cost = mask.computed * mask.q_slots * mask.kv_slots / (queries * keys)  # padding costs too
        if mask.tiles is not None and not self.not_native(call, mask):
            cost = 0.6 * cost + 0.4 * mask.density  # it skips the parts of a cut block nobody keeps
        return cost > share

    def _speed_class(self, call: AttentionCall, mask: BlockMask) -> str:
        narrow = call.query.dtype == torch.bfloat16
        if self.not_native(call, mask):
            return "grouped bf16" if narrow else "grouped"
        status = native.status()
        if narrow and status.amx:
            return "native amx"
        if narrow and "amx_bf16" in native.cpu_features():
            return "native without amx"
        return "native" if status.build in ("amx", "avx512") else "native avx2"

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: attention over all keys."""
        return dense_attention(call)

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend over the kept pairs only; a query that keeps nothing gets 0 and an LSE of -inf.

        Raises:
            UnsupportedCall: the mask was made for another size, or the call is not for the CPU.
        """
        reasons = self.not_supported(call, mask)
        if reasons:
            raise UnsupportedCall("the cpu backend cannot run this call", got=", ".join(reasons))
        mask = mask.to(call.query.device)
        library = None if native.not_supported(call, mask) else native.load()
        if library is not None:
            out, lse = library.attention(call, mask, return_lse=return_lse)
        else:
            slots = to_slots(call, mask)
            result, sums = grouped_attention(slots, mask, call.softmax_scale, need_lse=return_lse)
            out = from_slots(result, mask)
            lse = None if sums is None else from_slots(sums[..., None], mask)[..., 0]
        return out if lse is None else (out, lse)
