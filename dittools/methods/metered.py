"""Metered sparse attention: skipped blocks pooled, a few exact rows to see and mend the error.

Source: this project. It joins what publications hold apart (frontier surveyed in autumn 2026):
blocks that are not attended enter the softmax as their mean key and value (SVG-EAR, PISA); which
those are is decided by the error that pooling them would make, per cost (SVG-EAR); blocks are cut
along the axis order in which each head concentrates (PAROAttention), one threshold for all heads;
random rows are attended exactly, and what they show of the error is taken off all rows by a gated
ridge regression (SparsePR, on dropped output). The same rows measure every call's true error: a
head whose error grew since its blocks were chosen chooses anew, other heads keep theirs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.methods.base import (
    attend_exactly,
    attend_per_item,
    bad_param,
    check_params,
    param,
    tell,
)
from dittools.methods.block_sampling import (
    gather_heads,
    run_length,
    sampled_mass,
    sampled_slots,
)
from dittools.methods.block_statistics import mass_recall
from dittools.methods.compensation import (
    Runs,
    block_mask,
    padded_order,
    pool_runs,
    sparse_rows,
    with_pooled_keys,
)
from dittools.methods.error_score import pooling_error
from dittools.methods.metered_state import State
from dittools.methods.paro import NAMES, ORDER_BLOCKS, axis_order, best_order, distinct_orders
from dittools.methods.probes import probe_rows, rows_by_backend
from dittools.methods.repair import RIDGE, fit_repair
from dittools.methods.selection import keep_share
from dittools.order import TokenOrder

MODES = {
    "drop": "skipped blocks are left out",
    "pooled": "they enter as their means",
    "repair": "they enter as their means, and probe rows mend the rest",
}


@dataclass(frozen=True)
class Metered:
    """Blocks chosen by the error of skipping them, skipped ones pooled, the rest mended."""

    name: ClassVar[str] = "metered"
    density: float = param(0.2, "the mean share of blocks attended exactly", above=0.0, most=1.0)
    mode: str = param("repair", "what becomes of skipped blocks", choices=tuple(MODES))
    order: str | tuple[str, ...] = param(
        "auto",
        "the axis order of all heads, one per head, or 'gilbert'; 'auto' chooses",
    )
    score: str = param(
        "error",
        "whether blocks are ranked by the error of skipping them or by their mass",
        choices=("error", "mass"),
    )
    block_size: int = param(64, "the tokens per block", least=8, most=1024)
    rows: int = param(4, "the queries per block that stand for it in the choice", least=1)
    per_head: bool = param(False, "whether every head keeps the same share")
    probes: int = param(64, "the rows attended exactly; 0 for none", least=0)
    refresh: float = param(
        1.3,
        "the growth of a head's error at which blocks are chosen anew; 0 for every step",
        least=0.0,
    )
    ceiling: float = param(
        0.0, "the share of blocks for heads whose error passes `limit`", least=0.0, most=1.0
    )
    limit: float = param(0.0, "the relative error that is too much", least=0.0)
    start: float = param(
        0.0,
        "the share of the run in which heads whose error passes `limit` stay dense",
        least=0.0,
        most=1.0,
    )
    ridge: float = param(RIDGE, "the penalty of the repair, per row", above=0.0)
    rank: int = param(0, "the directions of the error that are repaired; 0 for all", least=0)

    def __post_init__(self) -> None:
        """Check the parameters and what they need of each other."""
        check_params(self)
        names = self.order if isinstance(self.order, tuple) else (self.order,)
        known = (*NAMES, "gilbert")
        if not names or any(n not in known and (n != "auto" or len(names) > 1) for n in names):
            expected = f"'auto', or one of {', '.join(known)}, once or per head"
            raise bad_param(self, "order", expected=expected)
        if self.mode == "repair" and self.probes < 8:
            raise bad_param(self, "probes", expected="at least 8 with mode='repair'")
        if (self.ceiling > 0 or self.start > 0) and not (self.limit > 0 and self.probes):
            raise bad_param(self, "limit", expected="above 0, with probes, for ceiling or start")
        if self.refresh and not self.probes:
            raise bad_param(self, "refresh", expected="0 without probes")

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys belong to no block; a list of orders must fit the heads."""
        extra = call.key.shape[1] - call.grid.total
        reasons = [f"metered has no block for {extra} extra keys"] if extra else []
        if isinstance(self.order, tuple) and len(self.order) != call.method_heads:
            reasons.append(f"metered lists {len(self.order)} orders for {call.method_heads} heads")
        if call.grid.tokens <= max(self.probes, self.block_size):
            reasons.append(
                f"metered needs more tokens than probes ({self.probes}) and than one block "
                f"({self.block_size}), got {call.grid.tokens}"
            )
        return reasons

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query; what was chosen stays in call.memory."""
        if self.density >= 1:
            return backend.dense(call)
        return attend_per_item(call, lambda item: self._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        key = f"metered {self} {call.grid} {call.head_count} {call.query.device}"
        state = call.memory.setdefault(key, State())
        blocks = -(-call.grid.tokens // self.block_size)
        starting = self.start > 0 and call.steps > 0 and call.step < self.start * call.steps
        pooled = None
        if starting or state.held is not None or state.wants_choice(self.refresh):
            pooled = self._choose(call, state, starting)
        assert state.order is not None
        assert state.mask is not None
        assert state.kept is not None
        made = call
        if self.mode != "drop":
            if pooled is None:
                pooled = pool_runs(call, state.order, blocks, self.block_size, self.block_size)
            made = with_pooled_keys(call, pooled)
        out = attend_exactly(made, backend, state.mask)
        if out is None:
            return backend.dense(call)
        if not self.probes:
            return out
        rows = self._rows(call)
        exact = rows_by_backend(call, backend, rows)
        if starting:  # what the rows would be if no head were held dense
            found = sparse_rows(made, rows, state.kept, state.order, self.block_size)
        else:
            found = out.index_select(1, rows)
        return self._mended(call, backend, out, (rows, exact, found), state)

    def _choose(self, call: AttentionCall, state: State, starting: bool) -> Runs:
        """Choose the blocks worth their cost; heads too far off get more, or all.

        Returns the mean keys and values of the blocks.
        """
        if state.order is None:
            names = self._names(call)
            state.order = padded_order(call.grid, names, self.block_size).to(call.query.device)
        size = self.block_size
        blocks = -(-call.grid.tokens // size)
        runs = pool_runs(call, state.order, blocks, size, run_length(size))
        score = self.scores(call, state.order, runs)  # a broken head must not set the threshold
        score = call.of_all_heads(score.nan_to_num(nan=0.0, posinf=0.0))
        own = slice(None) if call.peers is None else list(call.places)
        kept = keep_share(score, self.density, self.per_head)[own]
        if self.ceiling > self.density and state.high is not None:
            more = keep_share(score, self.ceiling, self.per_head)[own]
            kept = torch.where(state.high[:, None, None], more, kept)
        if self.mode == "drop":
            kept.diagonal(dim1=1, dim2=2).fill_(True)
        state.kept, state.base = kept, None
        state.held = None
        if starting:
            state.held = torch.ones_like(kept[:, 0, 0]) if state.near is None else ~state.near
        run = kept
        for dense in (state.held, state.broken):
            run = run if dense is None else run | dense[:, None, None]
        state.mask = block_mask(run, call.grid, state.order, size, self.mode != "drop")
        return runs.pooled()

    def _rows(self, call: AttentionCall) -> torch.Tensor:
        """Return int64 [R]: this call's probe rows, other ones at every layer and step."""
        seed = 1009 * call.layer + call.step
        rows = probe_rows(call.grid.tokens, self.probes, seed) + call.grid.text_before
        return rows.to(call.query.device)

    def _mended(
        self,
        call: AttentionCall,
        backend: Backend,
        out: torch.Tensor,
        probes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        state: State,
    ) -> torch.Tensor:
        """Return the output mended by its probe rows, and note what they say of the next call."""
        rows, exact, found = probes
        good = (found.isfinite() & exact.isfinite()).all(3).all(1).all(0)
        if not bool(good.all()):
            self._without(call, backend, out, ~good)
            calm = good[:, None]
            found, exact = (torch.where(calm, rest, 0.0) for rest in (found, exact))
            state.broken = ~good if state.broken is None else state.broken | ~good
            state.mask = None
        grid = call.grid
        fit = fit_repair(found, exact, ridge=self.ridge, rank=self.rank)
        error = fit.before
        if self.mode == "repair":
            error = fit.after
            span = slice(grid.text_before, grid.text_before + grid.tokens)
            fit.apply(out, span, good if state.held is None else good & ~state.held)
        out[0, rows] = torch.where(good[:, None], exact[0].to(out.dtype), out[0, rows])
        state.note(fit.before, error, self.limit)
        return out

    def _without(
        self, call: AttentionCall, backend: Backend, out: torch.Tensor, bad: torch.Tensor
    ) -> None:
        """Put dense attention where heads' probes are not finite, and say so."""
        heads = bad.nonzero().flatten().tolist()
        known = call.head_index or tuple(range(call.head_count))
        named = sorted({known[h % len(known)] for h in heads})
        tell(backend, f"metered ran heads dense, their probe rows were not finite: {named}")
        out[:, :, bad] = backend.dense(call.heads(heads)).to(out.dtype)

    def scores(self, call: AttentionCall, order: TokenOrder, runs: Runs) -> torch.Tensor:
        """Return float32 [H, blocks, blocks]: what each block is worth to each block of queries."""
        size, tokens = self.block_size, call.grid.tokens
        blocks = -(-tokens // size)
        if self.score == "mass":
            return _mass(call, order.index, size, self.rows)
        slots = sampled_slots(tokens, size, self.rows)
        each = len(slots) // blocks
        if len(slots) != each * blocks:  # a short last block has fewer to show: some stand twice
            part = torch.arange(self.rows)
            start = torch.arange(0, tokens, size)[:, None]
            sizes = (tokens - start).clamp(max=size)
            slots = (start + (2 * part + 1) * sizes // (2 * self.rows)).flatten()
            each = self.rows
        index = order.index[:, slots.to(order.index.device)]
        query = gather_heads(call.query[0], index)
        text = _text_scores(call, query)
        return pooling_error(query, runs, text, call.softmax_scale, each, self.mode != "drop")

    def _names(self, call: AttentionCall) -> tuple[str, ...]:
        if isinstance(self.order, tuple):
            names = self.order  # places past them belong to further items of a batch
            return tuple(names[place % len(names)] for place in call.places)
        if self.order != "auto":
            return (self.order,) * call.head_count
        distinct = distinct_orders(call.grid)
        if len(distinct) == 1:
            return (NAMES[0],) * call.head_count
        recalls = []
        for number in distinct:
            index = axis_order(call.grid, number)[None].to(call.query.device)
            mass = _mass(call, index, self.block_size, self.rows, ORDER_BLOCKS)
            recalls.append(mass_recall(mass, self.density))
        return tuple(NAMES[distinct[place]] for place in best_order(torch.stack(recalls)))


def _mass(
    call: AttentionCall, index: torch.Tensor, size: int, rows: int, blocks: int = 0
) -> torch.Tensor:
    """Return float32 [H, blocks, blocks]: attention mass of every block, as PARO estimates it."""
    bias = call.additive_mask()
    return sampled_mass(
        call.query[0],
        call.key[0],
        index,
        call.grid.tokens,
        size,
        call.softmax_scale,
        rows=rows,
        run=run_length(size),
        blocks=blocks,
        bias=None if bias is None else bias[0],
    )


def _text_scores(call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
    """Return float32 [H, n]: log-sum-exp of the scores of text keys, -inf without any."""
    grid = call.grid
    token = torch.arange(grid.total)
    at = torch.cat((token[: grid.text_before], token[grid.text_before + grid.tokens :]))
    if not len(at):
        return query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    at = at.to(query.device)
    scores = (query @ call.key[0, at].permute(1, 2, 0)).float() * call.softmax_scale
    bias = call.additive_mask()
    if bias is not None:
        scores = scores + bias[0][:, None, at]
    return scores.logsumexp(-1)
