"""A backend that also notes what it was asked for: pairs kept, time, and when dense was faster."""

import weakref
from collections.abc import Callable
from typing import overload

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend, choose
from dittools.mask import BlockMask
from dittools.patches.timing import Stopwatch

DENSE_IS_FASTER = "dense is faster at this density"

_DENSITY: "weakref.WeakKeyDictionary[BlockMask, float | torch.Tensor]" = weakref.WeakKeyDictionary()


class Meter:
    """Runs one site's call on a backend and measures it."""

    def __init__(
        self,
        backend: Backend,
        whole: AttentionCall,
        stock: Callable[[], torch.Tensor],
        watch: Stopwatch,
    ) -> None:
        """Start with nothing counted.

        Args:
            backend: what `resolve` returned.
            whole: the call of the site with all its heads.
            stock: computes `whole` as the stock pipeline would, bit for bit.
            watch: gets the time of the backend's work.
        """
        self._backend, self._whole, self._stock, self._watch = backend, whole, stock, watch
        self.name = backend.name
        self.used: set[str] = set()
        self.was_sparse = False
        self.declined = False  # dense was faster
        self.notes: list[str] = []  # what a method has to say of this call
        self._pairs: list[tuple[float, float | torch.Tensor]] = []  # pairs of a call, share kept

    def note(self, reason: str) -> None:
        """Keep a reason for the report."""
        self.notes.append(reason)

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """What the backend says."""
        return self._backend.not_supported(call, mask)

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """What the backend says under "auto"; a backend asked for by name runs what it is given."""
        if self.name == "auto" and self._backend.prefers_dense(call, mask):
            self.declined = True
            return True
        return False

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]; the site's own call runs exactly as the stock pipeline runs it."""
        self._pairs.append((_pair_count(call), 1.0))
        with self._watch.running(call.query.device):
            if call is self._whole:
                return self._stock()
            return self._backend.dense(call)

    def ran_dense(self, heads: int) -> None:
        """Count heads of the site's own call that were run dense by somebody else."""
        whole = self._whole
        self._pairs.append((_pair_count(whole) * heads / whole.head_count, 1.0))

    @overload
    def block_sparse(self, call: AttentionCall, mask: BlockMask) -> torch.Tensor: ...

    @overload
    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the mask; under "auto" dense instead where that is faster.

        Not where a log-sum-exp is wanted, which methods use that correct the result, and not over
        keys besides the sequence's own, which dense attention would count twice.
        """
        own_keys = call.key.shape[1] == call.query.shape[1]
        if own_keys and not return_lse and self.prefers_dense(call, mask):
            return self.dense(call)
        chosen = choose("auto", call, mask) if self.name == "auto" else self._backend
        self.used.add(chosen.name)
        self.was_sparse = True
        self._pairs.append((_pair_count(call), mask_density(mask)))
        with self._watch.running(call.query.device):
            if return_lse:
                return chosen.block_sparse(call, mask, return_lse=True)
            return chosen.block_sparse(call, mask)

    def density(self, call: AttentionCall) -> float | torch.Tensor:
        """Return the pairs computed as a share of all pairs of a call, capped at 1."""
        whole = float(call.query.shape[0] * call.query.shape[1] ** 2 * call.head_count)
        share: float | torch.Tensor = 0.0
        for pairs, kept in self._pairs:
            share = share + kept * (pairs / whole)
        return share.clamp(max=1.0) if isinstance(share, torch.Tensor) else min(share, 1.0)


def _pair_count(call: AttentionCall) -> float:
    batch, tokens, heads, _ = call.query.shape
    return float(batch * tokens * call.key.shape[1] * heads)


def mask_density(mask: BlockMask) -> float | torch.Tensor:
    """Return the share of kept pairs, once per mask.

    A mask on a GPU gives a 0-d tensor: reading it would make the GPU wait.
    """
    if mask not in _DENSITY:
        if mask.keep.device.type != "cpu":
            _DENSITY[mask] = mask.head_density().mean()
        else:
            _DENSITY[mask] = mask.density
    return _DENSITY[mask]
