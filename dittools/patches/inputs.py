"""Taps: what some methods need besides query, key and value, caught on the way to the call."""

from collections.abc import Mapping
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.methods import Method
from dittools.patches.sites import Site
from dittools.plans import Plan

_WHAT = {
    "features": "the input of its attention module",
    "unrotated": "the query before RoPE",
}


class Tap:
    """A hook that leaves one tensor with a site; copies share it, pickles leave it out."""

    def __init__(self, site: Site, name: str) -> None:
        """Catch `name` for a site."""
        self.site, self.name = site, name

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        """Share the tap with the copy, as it shares the site."""
        return self

    def __reduce__(self) -> Any:
        """Pickle as a hook that does nothing."""
        return ClosedTap, ()


class InputTap(Tap):
    """Forward pre-hook of an attention module: its hidden states."""

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Keep the hidden states until the call; a compiled graph does not stop for it."""
        if not torch.compiler.is_compiling():
            found = args[0] if args else kwargs.get("hidden_states")
            if isinstance(found, torch.Tensor):
                self.site.seen[self.name] = found


class OutputTap(Tap):
    """Forward hook of the last module a query goes through before it is rotated."""

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Keep the query until the call."""
        if not torch.compiler.is_compiling() and isinstance(out, torch.Tensor):
            self.site.seen[self.name] = out


class ClosedTap:
    """What a tap becomes in a pickled model."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


def needs_of(plan: Plan) -> set[str]:
    """Return what the methods of a plan need."""
    return {name for rule in plan.rules for name in getattr(rule.method, "needs", ())}


def tap(module: torch.nn.Module, site: Site, needs: set[str]) -> None:
    """Put the taps on an attention module that a plan needs."""
    if "features" in needs:
        module.register_forward_pre_hook(InputTap(site, "features"), with_kwargs=True)
    if "unrotated" in needs:
        source = getattr(module, "norm_q", None) or getattr(module, "to_q", None)
        if isinstance(source, torch.nn.Module):
            source.register_forward_hook(OutputTap(site, "unrotated"))


def untap(module: torch.nn.Module) -> None:
    """Take the taps off a module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, (Tap, ClosedTap)):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, (Tap, ClosedTap)):
            del module._forward_hooks[key]


def take_seen(site: Site, query: torch.Tensor, grid: TokenGrid) -> dict[str, torch.Tensor]:
    """Return what was caught for a call, cut to the tokens of its grid, and forget it.

    Args:
        site: of the call.
        query: [B, S, H, D] of the call.
        grid: of the call.
    """
    found = {}
    batch, _, heads, width = query.shape
    for name, caught in site.seen.items():
        tensor: torch.Tensor | None = caught
        if name == "unrotated":
            tensor = by_head(caught, (grid.tokens, grid.total), heads, width)
        if tensor is None or tensor.dim() < 3 or tensor.shape[0] != batch:
            continue
        if tensor.shape[1] == grid.tokens:
            found[name] = tensor
        elif tensor.shape[1] == grid.total:
            found[name] = tensor.narrow(1, grid.text_before, grid.tokens)
    site.seen.clear()
    return found


def by_head(
    tensor: torch.Tensor, lengths: tuple[int, int], heads: int, width: int
) -> torch.Tensor | None:
    """Return a query as [B, S, H, D], whatever its layout."""
    if tensor.dim() == 3 and tensor.shape[2] == heads * width:
        return tensor.view(*tensor.shape[:2], heads, width)
    if tensor.dim() != 4:
        return None
    if tensor.shape[1] in lengths and tensor.shape[2:] == (heads, width):
        return tensor
    if tensor.shape[2] in lengths and (tensor.shape[1], tensor.shape[3]) == (heads, width):
        return tensor.transpose(1, 2)
    return None


def lacking(method: Method, call: AttentionCall) -> list[str]:
    """Return what a method needs and does not get, one sentence each."""
    return [
        f"{method.name} needs {_WHAT[name]}, which is not known here "
        "(torch.compile, fused projections, or some of the heads only)"
        for name in getattr(method, "needs", ())
        if getattr(call, name) is None
    ]
