"""Inside the perturbed pass: the attention of a site whose selected heads attend to themselves."""

from collections.abc import Callable, Sequence

import torch

from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid
from dittools.methods.headhunter import HeadHunter, blend, self_and_text
from dittools.methods.placing import sent
from dittools.patches.masks import key_mask
from dittools.patches.sites import SeamCall
from dittools.plans.plan import HeadRule

# methods in which what a head sees does not depend on which other heads are in the call
HEADWISE = frozenset({"dense", "radial", "gna", "sta", "clear"})
# runs a call by the plan: (call, its heads among those of the site; None for all)
Plain = Callable[[SeamCall, "tuple[int, ...] | None"], torch.Tensor]


def perturb(
    call: SeamCall,
    spec: HeadHunter,
    heads: tuple[int, ...],
    grids: tuple[TokenGrid, ...],
    rules: Sequence[HeadRule],
    plain: Plain,
    pairwise_mask: bool,
) -> torch.Tensor:
    """Return attention in the layout of the call: selected heads perturbed, the others untouched.

    Args:
        call: every head of one site.
        spec: strength and mode.
        heads: selected ones, ascending.
        grids: geometry of all rows, or of each row of the batch.
        rules: what the plan says of the call.
        plain: runs heads by the plan.
        pairwise_mask: as in `Family`.
    Raises:
        UnsupportedCall: a mask or a split sequence that cannot be perturbed.
    """
    if call.options.get("parallel_config") is not None:
        raise split_refusal()
    whole = repeated(call)
    if spec.mode == "image" and any(grid.text for grid in grids):
        out = plain(call, None)
        for rows, grid in _rows(grids):
            _perturb_image(out, whole, spec.u, heads, rows, grid, pairwise_mask)
        return out
    if spec.u < 1:
        out = plain(call, None)
        mixed = blend(_pick(out, heads, call), _pick(whole.value, heads, call), spec.u)
        return _put(out, heads, mixed, call)
    return _identity(whole, heads, rules, plain)


def _identity(
    call: SeamCall, heads: tuple[int, ...], rules: Sequence[HeadRule], plain: Plain
) -> torch.Tensor:
    """Return the value in the selected heads; as far as methods allow only the others are run."""
    kept = computed_heads(rules, heads)
    out = call.value.clone(memory_format=torch.contiguous_format)
    if kept:
        part = plain(select_heads(call, kept), kept)
        places = [place for place, head in enumerate(kept) if head not in heads]
        rest = tuple(kept[place] for place in places)
        out = _put(out, rest, _pick(part, tuple(places), call), call)
    return out


def computed_heads(rules: Sequence[HeadRule], selected: tuple[int, ...]) -> tuple[int, ...]:
    """Return the heads that must run so that the unselected ones come out as without perturbation.

    A method that weighs heads against each other, or has a table with a row per head, runs on all
    the heads its rule gives it.
    """
    kept: set[int] = set()
    for heads, method in rules:
        rest = set(heads) - set(selected)
        if rest:
            kept |= rest if method.name in HEADWISE else set(heads)
    return tuple(sorted(kept))


def split_refusal() -> UnsupportedCall:
    """Return the error for a sequence that is split over devices."""
    return UnsupportedCall(
        "HeadHunter does not run under context parallelism",
        remedy="generate on one device, or detach the guidance",
    )


def restricted(rules: Sequence[HeadRule], kept: tuple[int, ...]) -> list[HeadRule]:
    """Return the rules of a call that holds only these heads, numbered as in that call."""
    place = {head: number for number, head in enumerate(kept)}
    cut = [(tuple(place[h] for h in heads if h in place), method) for heads, method in rules]
    return [(heads, method) for heads, method in cut if heads]


def _perturb_image(
    out: torch.Tensor,
    call: SeamCall,
    u: float,
    heads: tuple[int, ...],
    rows: slice,
    grid: TokenGrid,
    pairwise_mask: bool,
) -> None:
    """Overwrite the image tokens of the selected heads in some rows of the batch."""
    tensors = [_pick(t, heads, call) for t in (call.query, call.key, call.value)]
    if call.heads_first:
        tensors = [t.transpose(1, 2) for t in tensors]
    batch, tokens = tensors[0].shape[:2]
    found = key_mask(call.options.get("attn_mask"), batch, tokens, pairwise_mask)
    if found.reason:
        raise UnsupportedCall(f"HeadHunter cannot perturb image tokens alone: {found.reason}")
    q, k, v = (t[rows, : grid.total] for t in tensors)
    keep = None if found.keep is None else found.keep[rows, : grid.total]
    image = slice(grid.text_before, grid.text_before + grid.tokens)
    scale = call.options.get("scale")
    seen = self_and_text(q, k, v, image, q.shape[-1] ** -0.5 if scale is None else scale, keep)
    view = out.transpose(1, 2) if call.heads_first else out
    where = sent(torch.tensor(heads), out.device)
    part = view[rows, image]
    part.index_copy_(2, where, blend(part.index_select(2, where), seen, u).to(out.dtype))


def _rows(grids: tuple[TokenGrid, ...]) -> list[tuple[slice, TokenGrid]]:
    if len(grids) == 1:
        return [(slice(None), grids[0])]
    return [(slice(row, row + 1), grid) for row, grid in enumerate(grids)]


def repeated(call: SeamCall) -> SeamCall:
    """Return the call with grouped key and value heads repeated to one per query head."""
    axis = _axis(call)
    heads, groups = call.query.shape[axis], call.key.shape[axis]
    if heads == groups:
        return call
    k, v = (t.repeat_interleave(heads // groups, dim=axis) for t in (call.key, call.value))
    return SeamCall(call.query, k, v, {**call.options, "enable_gqa": False}, call.number)


def select_heads(call: SeamCall, heads: tuple[int, ...]) -> SeamCall:
    """Return the call of some heads; its keys and values are not grouped."""
    if len(heads) == call.query.shape[_axis(call)]:
        return call
    q, k, v = (_pick(t, heads, call) for t in (call.query, call.key, call.value))
    options = dict(call.options)
    mask = options.get("attn_mask")
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        options["attn_mask"] = mask.index_select(1, sent(torch.tensor(heads), mask.device))
    return SeamCall(q, k, v, options, call.number)


def _axis(call: SeamCall) -> int:
    return 1 if call.heads_first else 2


def _pick(tensor: torch.Tensor, heads: tuple[int, ...], call: SeamCall) -> torch.Tensor:
    return tensor.index_select(_axis(call), sent(torch.tensor(heads), tensor.device))


def _put(
    out: torch.Tensor, heads: tuple[int, ...], part: torch.Tensor, call: SeamCall
) -> torch.Tensor:
    where = sent(torch.tensor(heads), out.device)
    return out.index_copy_(_axis(call), where, part.to(out.dtype))
