"""Attention sites: one intercepted attention module each, and the calls they see."""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from dittools.patches.parallel import Shard
    from dittools.patches.root import Root

SITE_ATTRIBUTE = "_dit_site"
_NUMBERS = itertools.count()


class Original(NamedTuple):
    """A function that was bound to one of the two attention symbols.

    Attributes:
        function: called as diffusers calls it.
        heads_first: tensors are [B, H, S, D] (SDPA), not [B, S, H, D] (dispatcher).
    """

    function: Callable[..., torch.Tensor]
    heads_first: bool


class _Originals:
    """Originals by number, so that the opaque op can name one."""

    def __init__(self) -> None:
        self._all: list[Original] = []

    def add(self, function: Callable[..., torch.Tensor], *, heads_first: bool) -> int:
        """Return the number of an original, the same for the same function."""
        known = Original(function, heads_first)
        if known not in self._all:
            self._all.append(known)
        return self._all.index(known)

    def __getitem__(self, number: int) -> Original:
        return self._all[number]


ORIGINALS = _Originals()


@dataclass(frozen=True)
class SeamCall:
    """One attention call as the stock processor made it.

    Attributes:
        query: [B, S, H, D] or [B, H, S, D], as the original takes it; key and value alike.
        options: every further argument by name.
        number: of the original in ORIGINALS.
        shard: which heads these are, where other processes hold the rest; else None.
        heads: which heads of the site these are, where some were left out here; else empty.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]
    number: int
    shard: "Shard | None" = None
    heads: tuple[int, ...] = ()

    def dense(self) -> torch.Tensor:
        """Return what the stock pipeline would compute, in its own layout."""
        return ORIGINALS[self.number].function(self.query, self.key, self.value, **self.options)

    def row(self, index: int, tokens: int) -> "SeamCall":
        """Return the call of one row of the batch, cut to its own tokens; its mask is spent."""
        axis = 2 if self.heads_first else 1
        q, k, v = (
            t[index : index + 1].narrow(axis, 0, tokens) for t in (self.query, self.key, self.value)
        )
        options = {**self.options, "attn_mask": None}
        return replace(self, query=q, key=k, value=v, options=options)

    @property
    def heads_first(self) -> bool:
        """Whether the layout is [B, H, S, D]."""
        return ORIGINALS[self.number].heads_first


@dataclass(eq=False)
class Site:
    """One attention module that a plan may act on; lives on the module, shared by its copies.

    Attributes:
        path: module path inside the denoiser.
        name: path with the component in front, e.g. "transformer_2.blocks.0.attn1".
        layer: index in execution order.
        root: the attached denoiser.
        token: 0-d CPU tensor with the site's number, a graph input under torch.compile.
        seen: what the taps of `inputs` caught for the call that comes next.
    """

    path: str
    name: str
    layer: int
    root: "Root"
    token: torch.Tensor = field(init=False)
    seen: dict[str, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Draw a number and make the site findable by it."""
        number = next(_NUMBERS)
        self.token = torch.tensor(number, dtype=torch.int64, device="cpu")
        _SITES[number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        """Share the site: a copied model stays attached to the same runtime."""
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Drop out of a pickle: the attribute loads as None and the model as a stock one."""
        return type(None), ()


_SITES: "weakref.WeakValueDictionary[int, Site]" = weakref.WeakValueDictionary()


def site_of(token: torch.Tensor) -> Site | None:
    """Return the site of a number, None when its model is gone."""
    return _SITES.get(int(token))
