"""The "auto" backend: for each call the fastest one that fits."""

from typing import overload

import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.kernels import Backend, choose, load
from dittools.kernels.common import dense_attention
from dittools.mask import BlockMask


class AutoBackend:
    """Asks `choose` anew for every call, so that devices and shapes may differ between calls."""

    name = "auto"

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Every backend's refusal when none fits; empty otherwise."""
        return choose_reasons(call, mask)

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """What the chosen backend says; on a GPU anything is faster than the specification.

        That goes through heads and blocks of queries one by one: thousands of launches.
        """
        chosen = choose("auto", call, mask)
        slow = chosen.name == "reference" and call.query.device.type == "cuda"
        return (slow and call.quantize == "none") or chosen.prefers_dense(call, mask)

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: attention over all keys."""
        return dense_attention(call)

    @overload
    def block_sparse(self, call: AttentionCall, mask: BlockMask) -> torch.Tensor: ...

    @overload
    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the fastest backend that fits; see `Backend.block_sparse`."""
        chosen = choose("auto", call, mask)
        if return_lse:
            return chosen.block_sparse(call, mask, return_lse=True)
        return chosen.block_sparse(call, mask)


def choose_reasons(call: AttentionCall, mask: BlockMask | None) -> list[str]:
    """Return why "auto" finds nothing for a call; empty when it does."""
    try:
        choose("auto", call, mask)
    except UnsupportedCall as error:
        return [str(error)]
    return []


def resolve(name: str) -> Backend:
    """Return the backend of a name, "auto" included.

    Raises:
        UnsupportedCall: no such backend, or it cannot be loaded here.
    """
    backend: Backend = AutoBackend() if name == "auto" else load(name)
    return backend
