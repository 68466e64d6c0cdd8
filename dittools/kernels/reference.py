"""The specification: plain torch, any device, one query block at a time, sums in fp32 or wider."""

import torch

from dittools.call import AttentionCall
from dittools.kernels.common import dense_attention, from_slots, misfit, to_slots, weigh
from dittools.kernels.quantised import kept_columns, quantised_attention
from dittools.mask import BlockMask


class ReferenceBackend:
    """Computes exactly what the mask says; other backends are tested against it."""

    name = "reference"

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Only a mask of another size cannot run."""
        return [] if mask is None else misfit(call, mask)

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Never: the reference does what it is told."""
        return False

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: attention over all keys."""
        return dense_attention(call)

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend over the kept pairs only.

        Softmax runs over a query's kept keys; dropped keys weigh exactly zero. A query that keeps
        nothing gets 0 and a log-sum-exp of -inf. Keys and values that are not finite reach only
        the queries that keep them.

        Args:
            call: query, key, value are [B, S, H, D]; its `quantize` is followed.
            mask: must cover the call's slots.
            return_lse: also return the log-sum-exp, float [B, S, H].
        Raises:
            UnsupportedCall: the mask was made for another size.
        """
        if call.quantize != "none":
            rounded, sums = quantised_attention(call, mask)
            return (rounded, sums) if return_lse else rounded
        mask = mask.to(call.query.device)
        slots = to_slots(call, mask)
        wide = torch.promote_types(call.query.dtype, torch.float32)
        out = torch.zeros(slots.query.shape, dtype=wide, device=call.query.device)
        lse = torch.full(slots.query.shape[:3], float("-inf"), dtype=wide, device=call.query.device)
        for head in range(slots.query.shape[1]):
            for q_block in range(mask.keep.shape[1]):
                rows = slice(q_block * mask.q_block, (q_block + 1) * mask.q_block)
                columns, kept = kept_columns(mask, head, q_block, slots.key.shape[2])
                q = slots.query[:, head, rows].to(wide) * call.softmax_scale
                scores = q @ slots.key[:, head, columns].to(wide).transpose(1, 2)
                kept = kept[None, : q.shape[1]]
                if slots.bias is not None:
                    line = slots.bias[:, min(head, slots.bias.shape[1] - 1), columns]
                    scores = scores + line[:, None].to(wide)
                    kept = kept & ~line.isneginf()[:, None]
                scores = scores.masked_fill(~kept, float("-inf"))
                lse[:, head, rows] = torch.logsumexp(scores, dim=-1)
                empty = lse[:, head, rows].eq(float("-inf"))[..., None]
                weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0)
                out[:, head, rows] = weigh(weights, slots.value[:, head, columns].to(wide), kept)
        result = from_slots(out.to(call.query.dtype), mask)
        return (result, from_slots(lse[..., None], mask)[..., 0]) if return_lse else result
