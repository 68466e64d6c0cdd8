"""The CPU backend: the native kernel, or gathered blocks and SDPA where that cannot run."""

import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.kernels import native
from dittools.kernels.common import dense_attention, from_slots, misfit, to_slots
from dittools.kernels.cpu_grouped import grouped_attention
from dittools.mask import BlockMask

_GROUPED_BREAK_EVEN = {torch.float32: 0.35}


class CpuBackend:
    """Runs on the CPU in time proportional to the mask's computed share."""

    name = "cpu"

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Refuse tensors elsewhere, dtypes that are not floating-point, masks of another size."""
        reasons = []
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
        """Whether dense attention would be at least as fast as this mask."""
        return mask.computed > _GROUPED_BREAK_EVEN.get(call.query.dtype, 0.25)

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
