"""A backend that works out a few query rows only: what a candidate would have made of a call."""

from collections.abc import Callable
from typing import Any, overload

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import tell
from dittools.searching.rows import mask_rows, masked_output, weights

_TOLD_BY = 8  # channels of one head by which a query is found


class RowBackend:
    """Exact attention of some queries, zero for all others; counts what each head keeps.

    Scores of the sampled queries are worked out once per call and shared by all candidates. Calls
    of another shape (gathered queries, quantised products) run whole on the backend behind.

    A method that mends its output by rows attended exactly asks for these before it reads its own;
    they are worked out too then, in the output it holds. Rows nobody asked for are NaN: a method
    that reads them must not pass for a good one.

    Args:
        backend: runs what cannot be sampled.
        whole: the call of the site with all its heads.
        rows: int64 [R], queries looked at.
    """

    def __init__(self, backend: Backend, whole: AttentionCall, rows: torch.Tensor) -> None:
        """Start with nothing counted."""
        self._backend, self._whole, self.name = backend, whole, backend.name
        self._rows, self._at = rows, rows.to(whole.query.device)
        self._made: dict[tuple[object, ...], Any] = {}
        self._last: tuple[AttentionCall, BlockMask, torch.Tensor, torch.Tensor] | None = None
        self._weights: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, object]] = []
        self.forget()

    def once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Return what `make` gives: made for the first candidate, found by the others."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def forget(self) -> None:
        """Start counting for the next candidate; scores stay."""
        heads = self._whole.head_count
        self._last = None
        self.kept = torch.zeros(heads, dtype=torch.float64)
        self.visited = torch.zeros(heads, dtype=torch.float64)

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """What the backend says."""
        return self._backend.not_supported(call, mask)

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Never: the plan decides."""
        return False

    def note(self, reason: str) -> None:
        """Pass on why part of a call did not run as planned."""
        tell(self._backend, reason)

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D], NaN but for the sampled rows."""
        one = torch.ones(1, dtype=torch.float64)
        self._count(call, one, one)
        if not self._fits(call):
            self._also(call)
            return self._backend.dense(call)
        return self._run(call, None)[0]

    @overload
    def block_sparse(self, call: AttentionCall, mask: BlockMask) -> torch.Tensor: ...

    @overload
    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return [B, S, H, D], NaN but for the sampled rows, and their log-sum-exp [B, S, H]."""
        density, computed = mask.head_density(), mask.keep.double().mean(dim=(1, 2))
        self._count(call, density.cpu(), computed.cpu())
        if not self._fits(call):
            if return_lse:
                return self._backend.block_sparse(call, mask, return_lse=True)
            return self._backend.block_sparse(call, mask)
        out, lse = self._run(call, mask)
        self._last = call, mask, out, lse
        return (out, lse) if return_lse else out

    def _also(self, asked: AttentionCall) -> None:
        """Work out the rows of the last masked call whose queries a method asks about exactly."""
        if self._last is None:
            return
        call, mask, out, lse = self._last
        rows = rows_in(asked.query, call.query)
        if rows is None:
            return
        kept = mask_rows(mask, rows.cpu()).to(out.device)
        for item in range(call.query.shape[0]):
            part, log = _masked(_weights_of(call, item, rows), kept, _values(call, item))
            out[item, rows], lse[item, rows] = part.to(out.dtype), log

    def _fits(self, call: AttentionCall) -> bool:
        return (
            call.query.shape[1] == self._whole.query.shape[1]
            and call.grid == self._whole.grid
            and getattr(call, "quantize", "none") == "none"
        )

    def _count(self, call: AttentionCall, density: torch.Tensor, computed: torch.Tensor) -> None:
        """Add the shares of a call to its heads; a batch folded into heads is averaged.

        Calls of gathered queries name no heads: theirs is spread over all.
        """
        heads = self._whole.head_count
        if not self._fits(call):
            batch, tokens = self._whole.query.shape[:2]
            every = call.query[..., 0].numel() * call.key.shape[1] / (batch * tokens**2 * heads)
            self.kept += float(density.mean()) * every
            self.visited += float(computed.mean()) * every
            return
        where = self._heads_of(call) % heads
        folded = self._whole.query.shape[0] > 1 and call.query.shape[0] == 1
        pairs = call.query.shape[1] * call.key.shape[1] / self._whole.query.shape[1] ** 2
        pairs /= self._whole.query.shape[0] if folded else 1
        for total, share in ((self.kept, density), (self.visited, computed)):
            total.index_add_(0, where, (share * pairs).expand(len(where)).contiguous())

    def _heads_of(self, call: AttentionCall) -> torch.Tensor:
        """Return int64 [heads of the call]: which heads of the whole call these are.

        Told by their first queries: methods split heads as they like, and fold batches into them.
        """
        own, all_ = (
            c.query[:, :4].permute(0, 2, 1, 3).flatten(2).flatten(0, 1) for c in (call, self._whole)
        )
        same = (own[: call.head_count, None] == all_[None]).all(dim=2)
        found = same.int().argmax(dim=1)
        return torch.where(
            same.any(dim=1), found, torch.arange(len(found), device=found.device)
        ).cpu()

    def _run(
        self, call: AttentionCall, mask: BlockMask | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.full_like(call.query, float("nan"))
        lse = call.query.new_full(call.query.shape[:3], float("nan"), dtype=torch.float32)
        kept = None if mask is None else mask_rows(mask, self._rows).to(out.device)
        for item, scores in enumerate(self.weights(call)):
            part, log = _masked(scores, kept, _values(call, item))
            out[item, self._at], lse[item, self._at] = part.to(out.dtype), log
        return out, lse

    def weights(self, call: AttentionCall) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return per item [H, R, N] exp(score - row maximum) and the maxima, kept for this call."""
        for query, key, bias, found in self._weights:
            if query is call.query and key is call.key and bias is call.key_bias:
                return found  # type: ignore[return-value]
        made = [_weights_of(call, item, self._at) for item in range(call.query.shape[0])]
        if call.key is self._whole.key:  # others are made by one candidate and seen once
            self._weights.append((call.query, call.key, call.key_bias, made))
        return made


def _weights_of(
    call: AttentionCall, item: int, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [H, R, N] exp(score - row maximum) of some queries of an item, and the maxima."""
    bias = call.additive_mask()
    line = None if bias is None else bias[min(item, len(bias) - 1)][:, None].float()
    q = call.query[item, rows].transpose(0, 1).float()
    k = call.key[item].transpose(0, 1).float()
    return weights(q, k, call.softmax_scale, line)


def _values(call: AttentionCall, item: int) -> torch.Tensor:
    return call.value[item].transpose(0, 1).float()


def _masked(
    scores: tuple[torch.Tensor, torch.Tensor], kept: torch.Tensor | None, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [R, H, D] over the kept keys, all of them without a mask, and [R, H] log-sum-exp."""
    weight, peak = scores
    if kept is None:
        total = weight.sum(dim=-1, keepdim=True)
        part = weight @ value / total
    else:
        part = masked_output(weight, kept, value)
        total = (weight * kept).sum(dim=-1, keepdim=True)
    log = total.clamp(min=1e-38).log() + peak
    return part.transpose(0, 1), log[..., 0].transpose(0, 1)


def rows_in(asked: torch.Tensor, query: torch.Tensor) -> torch.Tensor | None:
    """Return int64 [R]: where the queries [B, R, H, D] lie among those of a call [B, S, H, D].

    None where they are not all queries of the call. Told by a few channels first, as comparing all
    of them would take R x S x H x D.
    """
    if asked.shape[:1] + asked.shape[2:] != query.shape[:1] + query.shape[2:]:
        return None
    some, every = (x[0, :, 0, :_TOLD_BY] for x in (asked, query))
    rows = (some[:, None] == every[None]).all(dim=2).int().argmax(dim=1)
    return rows if torch.equal(query[:, rows], asked) else None
