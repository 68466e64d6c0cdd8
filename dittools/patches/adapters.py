"""The facts dittools needs of a model family, and the open table of them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from dittools.errors import AttachError, InputError
from dittools.grid import TokenGrid
from dittools.patches.refining import Refining


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one forward sit.

    Attributes:
        grids: geometry of every sequence a main attention call may see; told apart by length.
        by_path: (regular expression, grids) that hold for matching sites only, before `grids`.
        text_up_to: text tokens behind the grid of grids[0], at most; for families that drop
            padding before the call, so that their number varies.
        rows: geometry of each row of the batch where rows differ; a row shorter than the sequence
            is padded at its end.
        levels: `grids` are levels of one picture, the finest first.
        streams: lengths of the parts of the sequence that enter the denoiser one by one, so that
            context parallelism splits them one by one; in the order of the sequence.
    """

    grids: tuple[TokenGrid, ...]
    by_path: tuple[tuple[str, tuple[TokenGrid, ...]], ...] = ()
    text_up_to: int = 0
    rows: tuple[TokenGrid, ...] = ()
    levels: bool = False
    streams: tuple[int, ...] = ()

    def place(self, path: str, tokens: int) -> TokenGrid | None:
        """Return the geometry of a sequence of that length at a site, None when none fits."""
        for pattern, grids in self.by_path:
            if re.fullmatch(pattern, path):
                return next((g for g in grids if g.total == tokens), None)
        for grid in self.grids:
            if grid.total == tokens:
                return grid
        if self.text_up_to and self.grids:
            grid = self.grids[0]
            text = tokens - grid.tokens
            if 0 <= text <= self.text_up_to:
                return TokenGrid(*grid.shape, text_after=text)
        return None

    def by_row(self, batch: int, tokens: int) -> tuple[TokenGrid, ...]:
        """Return the geometry of each row where rows differ and fit the call, else nothing."""
        fits = len(self.rows) == batch and max(grid.total for grid in self.rows) == tokens
        return self.rows if fits else ()


Resolver = Callable[[Mapping[str, Any], torch.nn.Module], Layout]


def _no_preset_variant(denoiser: torch.nn.Module, components: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class Family:
    """Facts of one model family.

    Attributes:
        name: short name, the key of published presets.
        denoisers: class names of its denoisers; subclasses count.
        sites: regular expressions of module paths, in execution order; numbers sort as numbers.
        layout: finds the geometry from the denoiser's bound forward arguments.
        branches: names of unnamed calls in one step, in call order.
        batched: halves of a batch with classifier-free guidance, ("uncond", "cond") or the other
            way round; empty when each branch is a call of its own.
        unguided: regular expressions of sites that head-level guidance does not address.
        timestep: forward argument that holds the timestep.
        pairwise_mask: a bool [B, 1, S, S] mask is an outer product of valid tokens.
        variant: name of a variant with published presets of its own, "" for none.
        blocked: why this family cannot be accelerated, "" when it can.
        notes: facts a user should know, printed in the report.
        refining: facts for refining a clip at a larger size, None where nobody wrote them down.
    """

    name: str
    denoisers: tuple[str, ...]
    sites: tuple[str, ...]
    layout: Resolver
    branches: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    unguided: tuple[str, ...] = ()
    timestep: str = "timestep"
    pairwise_mask: bool = False
    variant: Callable[[torch.nn.Module, Mapping[str, Any]], str] = field(default=_no_preset_variant)
    blocked: str = ""
    notes: tuple[str, ...] = ()
    refining: Refining | None = None


_FAMILIES: dict[str, Family] = {}
_BUILT_IN = (
    "allegro",
    "auraflow",
    "cogvideox",
    "cosmos",
    "flux",
    "hunyuan_video",
    "ltx",
    "lumina2",
    "mochi",
    "pixart",
    "qwen_image",
    "sana",
    "sd3",
    "unet",
    "wan",
    "z_image",
)


def register_family(family: Family) -> Family:
    """Add a family to the table, or replace the one of the same name; returns it."""
    _FAMILIES[family.name] = family
    return family


def families() -> dict[str, Family]:
    """Return every known family by name."""
    for name in _BUILT_IN:
        import_module(f"dittools.patches.families.{name}")
    return dict(_FAMILIES)


def family_of(denoiser: torch.nn.Module) -> Family | None:
    """Return the family of a denoiser by its class name or that of a base class."""
    known = families()
    for kind in type(denoiser).__mro__:
        for family in known.values():
            if kind.__name__ in family.denoisers:
                return family
    return None


def argument(arguments: Mapping[str, Any], name: str) -> Any:
    """Return one forward argument.

    Raises:
        AttachError: the denoiser was called without it.
    """
    value = arguments.get(name)
    if value is None:
        raise AttachError(f"the denoiser was called without {name}", got=", ".join(arguments))
    return value


def patched(size: int, patch: int) -> int:
    """Return the tokens along one side: whole patches only."""
    return int(size) // int(patch)


def patch_of(denoiser: torch.nn.Module, name: str = "patch_size") -> Any:
    """Return a patch size of the denoiser's config."""
    config = denoiser.config
    value = getattr(config, name, None)
    if value is None:
        raise InputError(f"{type(denoiser).__name__} has no {name} in its config")
    return value


def image_grid(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> TokenGrid:
    """Return the grid of [B, C, H, W] latents cut into square patches."""
    height, width = argument(arguments, "hidden_states").shape[-2:]
    patch = patch_of(denoiser)
    return TokenGrid(1, patched(height, patch), patched(width, patch))


def latent_video(arguments: Mapping[str, Any], denoiser: torch.nn.Module) -> Layout:
    """Return the layout of [B, C, F, H, W] latents without text in the sequence.

    The patch is (time, side, side) in the config, or `patch_size` and `patch_size_t` apart.
    """
    sizes = argument(arguments, "hidden_states").shape[2:]
    patch = patch_of(denoiser)
    if not isinstance(patch, (tuple, list)):
        patch = (patch_of(denoiser, "patch_size_t"), patch, patch)
    return Layout((TokenGrid(*(patched(n, p) for n, p in zip(sizes, patch, strict=True))),))
