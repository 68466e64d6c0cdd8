"""The inputs of one attention call, and nothing about who asks or who answers."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid

# products in few bits: query with key, then weights with values
QUANTIZE = {
    "none": "exact",
    "int8": "INT8 and INT8",
    "int8_fp8": "INT8 and FP8",
    "int8_half": "INT8 and exact",
    "int4": "INT4 and INT4",
}


@dataclass(frozen=True, eq=False)
class Peers:
    """All the heads one method runs, of which a call holds some: other processes hold the rest.

    Attributes:
        count: of these heads.
        own: places of the call's heads among them, ascending.
        gather: takes [own, ...] to [count, ...]; each process that holds one of them calls it.
    """

    count: int
    own: tuple[int, ...]
    gather: Callable[[torch.Tensor], torch.Tensor]

    def folded(self, batch: int) -> "Peers":
        """Return the peers of a call whose batch is folded into its heads, item after item."""

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            by_head = tensor.unflatten(0, (batch, len(self.own))).transpose(0, 1).contiguous()
            return self.gather(by_head).transpose(0, 1).flatten(0, 1)

        own = tuple(item * self.count + place for item in range(batch) for place in self.own)
        return Peers(batch * self.count, own, gather)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One self- or joint-attention call.

    Attributes:
        query: [B, S, H, D], after QK-norm and RoPE.
        key: [B, S_k, H, D]; S_k is S for a method, or more when pooled or extra keys follow the
            sequence's own; a plain mask without a token order takes any S_k.
        value: [B, S_k, H, D].
        grid: geometry of the sequence; grid.total == S.
        layer: index of the site in execution order.
        step: denoising step, from 0.
        steps: steps of the whole run, 0 when unknown.
        branch: "cond", "uncond", "" when not told apart.
        scale: factor on the scores; None means D ** -0.5.
        key_mask: bool [B, S_k], False drops a key (padded prompt tokens); None keeps all.
        key_bias: float [B or 1, H or 1, S_k] added to the scaled scores, in natural-log units.
        memory: state that lives across steps for this (site, branch, call ordinal) and its heads.
        head_index: which heads of the site these are; empty for all of them, in order.
        quantize: one of QUANTIZE; "none" multiplies in the tensors' own precision.
        features: [B, grid.tokens, C], the input of the attention module for the grid's tokens;
            None where nobody asked for it or it is not known.
        unrotated: [B, grid.tokens, H, D], the query of the grid's tokens before RoPE; likewise.
        full: geometry of the finest level of the model, where levels differ (UNets); else None.
        peers: what the method runs in all, where other processes hold some of its heads.
        items: clips whose heads follow one another, where a batch is folded into heads.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: TokenGrid
    layer: int = 0
    step: int = 0
    steps: int = 0
    branch: str = ""
    scale: float | None = None
    key_mask: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    memory: MutableMapping[str, Any] = field(default_factory=dict)
    head_index: tuple[int, ...] = ()
    quantize: str = "none"
    features: torch.Tensor | None = None
    unrotated: torch.Tensor | None = None
    full: TokenGrid | None = None
    peers: Peers | None = None
    items: int = 1

    def __post_init__(self) -> None:
        """Check shapes, dtypes and devices once, where the call is made."""
        q, k, v = self.query, self.key, self.value
        if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape:
            raise UnsupportedCall(
                "query, key and value do not fit together",
                expected="[B, S, H, D] each, key and value alike",
                got=f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}",
            )
        if (q.shape[0], q.shape[2], q.shape[3]) != (k.shape[0], k.shape[2], k.shape[3]):
            raise UnsupportedCall(
                "query and key differ in batch, heads or head_dim",
                expected=str(tuple(q.shape)),
                got=str(tuple(k.shape)),
                remedy="repeat grouped key/value heads before the call",
            )
        if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
            raise UnsupportedCall(
                "query, key and value differ in dtype or device",
                expected=f"{q.dtype} on {q.device}",
                got=f"{k.dtype} on {k.device}, {v.dtype} on {v.device}",
            )
        if not q.dtype.is_floating_point:
            raise UnsupportedCall(
                "attention needs fractions", expected="a floating-point dtype", got=str(q.dtype)[6:]
            )
        self._check_weights()
        if q.shape[1] != self.grid.total or k.shape[1] < 1:
            raise UnsupportedCall(
                "the sequence is not as long as its grid",
                expected=f"{self.grid.total} tokens for {self.grid}",
                got=f"{q.shape[1]} queries, {k.shape[1]} keys",
            )

    def _check_weights(self) -> None:
        """Refuse weights of keys that kernels would read past the end of."""
        (batch, keys, heads), bias, mask = self.key.shape[:3], self.key_bias, self.key_mask
        found, expected = None, ""
        if mask is not None and not (
            mask.dtype == torch.bool and tuple(mask.shape) in ((batch, keys), (1, keys))
        ):
            found, expected = mask, f"bool [{batch}, {keys}]"
        elif bias is not None and not (
            bias.dtype.is_floating_point
            and bias.dim() == 3
            and (bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads))
            and bias.shape[2] == keys
        ):
            found, expected = bias, f"float [{batch} or 1, {heads} or 1, {keys}]"
        if found is not None:
            name = "key_mask" if found is mask else "key_bias"
            got = f"{str(found.dtype)[6:]} {list(found.shape)}"
            raise UnsupportedCall(f"{name} does not fit the keys", expected=expected, got=got)
        for name, part in (("key_mask", mask), ("key_bias", bias)):
            if part is not None and part.device != self.key.device:
                raise UnsupportedCall(
                    f"{name} is on another device than the keys",
                    expected=str(self.key.device),
                    got=str(part.device),
                )

    @property
    def head_count(self) -> int:
        """Number of heads."""
        return int(self.query.shape[2])

    @property
    def method_heads(self) -> int:
        """Number of heads the method runs in all processes together."""
        return self.head_count if self.peers is None else self.peers.count

    @property
    def places(self) -> tuple[int, ...]:
        """The places of this call's heads among them."""
        return tuple(range(self.head_count)) if self.peers is None else self.peers.own

    def of_all_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return [method_heads, ...] of the [H, ...] each process has; a collective call."""
        return tensor if self.peers is None else self.peers.gather(tensor)

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores, resolved."""
        return float(self.query.shape[-1]) ** -0.5 if self.scale is None else self.scale

    def heads(self, index: Sequence[int]) -> "AttentionCall":
        """Return the sub-call of some heads, in the given order, with a memory of their own.

        What a method remembers of some heads says nothing about others, even if the same method
        runs both, at another step say.
        """
        if list(index) == list(range(self.head_count)):
            return self
        named = self.head_index or tuple(range(self.head_count))
        chosen = tuple(named[i] for i in index)
        device = self.query.device  # CUDA has read the list when this returns
        where = torch.tensor(list(index)).to(device, non_blocking=device.type == "cuda")
        bias = self.key_bias
        if bias is not None and bias.shape[1] > 1:
            bias = bias.index_select(1, where)
        return replace(
            self,
            query=self.query.index_select(2, where),
            key=self.key.index_select(2, where),
            value=self.value.index_select(2, where),
            unrotated=None if self.unrotated is None else self.unrotated.index_select(2, where),
            key_bias=bias,
            memory=self.memory.setdefault(f"heads {chosen}", {}),
            head_index=chosen,
            peers=None,
            items=1,
        )

    def additive_mask(self) -> torch.Tensor | None:
        """Fold key_mask and key_bias into one float [B or 1, H or 1, S_k]; None without either."""
        bias = None if self.key_bias is None else self.key_bias.float()
        if self.key_mask is not None:
            dropped = torch.zeros(self.key_mask.shape, device=self.query.device)
            dropped = dropped.masked_fill(~self.key_mask, float("-inf"))[:, None]
            bias = dropped if bias is None else bias + dropped
        return bias
