"""Probe rows of clustered attention: attended exactly, and used to mend the others."""

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.methods.base import tell
from dittools.methods.block_sampling import gather_heads
from dittools.methods.cluster_layout import Groups
from dittools.methods.placing import sent
from dittools.methods.probes import probe_rows
from dittools.methods.repair import fit_repair

FEWEST = 8  # rows a repair can be fitted on


def mend(
    call: AttentionCall,
    backend: Backend,
    out: torch.Tensor,
    groups: Groups | None,
    *,
    probes: int,
    ridge: float,
    rank: int,
    gated: bool,
    of_query: bool,
) -> None:
    """Take the error that probe rows show off all of the grid's rows of [1, S, H, D], in place.

    Heads whose probe rows are not finite run dense, and the report says so.

    Args:
        call: batch 1.
        backend: runs the probe rows.
        out: sparse output.
        groups: rows stand nearest the means of the largest of them; None draws them.
        probes: rows.
        ridge, rank, gated: as `fit_repair` takes them.
        of_query: whether it learns from queries too.
    """
    grid = call.grid
    weight = None
    if groups is None:
        drawn = probe_rows(grid.tokens, probes, 1009 * call.layer + call.step)
        rows = sent(drawn, call.query.device).expand(call.head_count, -1)
    else:
        rows, weight = group_rows(call, groups, probes)
    rows = rows + grid.text_before
    where = rows.t()[None, :, :, None].expand(-1, -1, -1, out.shape[3])
    query = gather_heads(call.query[0], rows).transpose(0, 1)[None]
    exact = backend.dense(
        AttentionCall(
            query,
            call.key,
            call.value,
            TokenGrid(1, 1, rows.shape[1]),
            scale=call.scale,
            key_mask=call.key_mask,
            key_bias=call.key_bias,
        )
    )
    found = out.gather(1, where)
    good = (found.isfinite() & exact.isfinite()).all(3).all(1).all(0)
    if not bool(good.all()):
        _without(call, backend, out, ~good)
        found, exact, query = (torch.where(good[:, None], x, 0.0) for x in (found, exact, query))
    if rows.shape[1] >= FEWEST:
        fit = fit_repair(
            found,
            exact,
            query=query if of_query else None,
            ridge=ridge,
            rank=rank,
            gated=gated,
            weight=weight,
        )
        span = slice(grid.text_before, grid.text_before + grid.tokens)
        fit.apply(out, span, good, call.query if of_query else None)
    placed = torch.where(good[:, None], exact.to(out.dtype), out.gather(1, where))
    out.scatter_(1, where, placed)


def _without(call: AttentionCall, backend: Backend, out: torch.Tensor, bad: torch.Tensor) -> None:
    heads = bad.nonzero().flatten().tolist()
    known = call.head_index or tuple(range(call.head_count))
    named = sorted({known[h % len(known)] for h in heads})
    tell(backend, f"clustered ran heads dense, their probe rows were not finite: {named}")
    out[:, :, bad] = backend.dense(call.heads(heads)).to(out.dtype)


def group_rows(
    call: AttentionCall, groups: Groups, probes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [H, R], tokens of the grid, and float32 [H, R], the queries each stands for.

    Groups take turns, the largest first; each gives the query nearest to its mean, then the next.
    """
    grid = call.grid
    tokens, count = grid.tokens, groups.queries.shape[1]
    video = slice(grid.text_before, grid.text_before + tokens)
    query = call.query[0, video].transpose(0, 1).to(groups.query.dtype)
    label = groups.query_labels
    mean = groups.query.gather(1, label[..., None].expand(-1, -1, query.shape[2]))
    near = (query - mean).square().sum(2).argsort(dim=1, stable=True)
    near = near.gather(1, label.gather(1, near).argsort(dim=1, stable=True))
    owner = label.gather(1, near)
    first = groups.queries.cumsum(1) - groups.queries
    turn = torch.arange(tokens, device=query.device) - first.gather(1, owner)
    by_size = groups.queries.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(by_size)
    place.scatter_(1, by_size, torch.arange(count, device=query.device).expand_as(by_size))
    chosen = (turn * count + place.gather(1, owner)).argsort(dim=1, stable=True)
    chosen = chosen[:, : min(probes, tokens)]
    owner = owner.gather(1, chosen)
    taken = torch.zeros_like(groups.queries).scatter_add_(1, owner, torch.ones_like(owner))
    weight = groups.queries / taken.clamp(min=1)
    return near.gather(1, chosen), weight.gather(1, owner).float()
