"""Metered sparse attention: skipped blocks pooled, a few exact rows to see and mend the error.

Source: this project. It joins what publications hold apart (frontier surveyed in autumn 2026):
blocks that are not attended enter the softmax as their mean key and value (SVG-EAR, PISA); which
those are is decided by the error that pooling them would make, per cost (SVG-EAR); blocks are cut
along the axis order in which each head concentrates (PAROAttention), one threshold for all heads;
random rows are attended exactly, and what they show of the error is taken off all rows by a gated
ridge regression (SparsePR, on dropped output). The same rows measure every call's true error: a
head whose error grew since its blocks were chosen chooses anew, other heads keep theirs. Few
queries tell what a block is worth, but other ones at every step, and what earlier steps found
counts on: blocks are as well chosen as from several times as many.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import (
    attend_per_item,
    bad_param,
    block_for,
    check_params,
    once,
    param,
    tell,
)
from dittools.methods.compensation import Runs, padded_order, with_pooled_keys
from dittools.methods.metered_blocks import KEYS, Blocks, alike_keys, alike_order, cut_lasts
from dittools.methods.metered_choice import block_mass, error_scores, order_names, some_heads
from dittools.methods.metered_state import State
from dittools.methods.paro import NAMES
from dittools.methods.placing import sent
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
    block_size: int = param(
        0,
        "the tokens per block, at least 8; 0 for 128, fewer where these would be under 32 blocks",
        least=0,
        most=1024,
    )
    key_block: int = param(
        0,
        "the keys per block, a divisor of `block_size`; 0 for as many, half as many alike ones",
        least=0,
        most=1024,
    )
    keys: str = param(
        "order",
        "whether blocks of keys are cut along the order of the queries, or made of keys that are "
        "alike, which wants 8 `rows`",
        choices=tuple(KEYS),
    )
    rows: int = param(4, "the queries per block that stand for it in the choice", least=1)
    first_look: int = param(
        4,
        "how many times as many `rows` stand for blocks of which nothing is known yet",
        least=1,
    )
    carry: float = param(
        0.5,
        "how much of what blocks were worth a step before counts on, other queries of a block "
        "being looked at in turn; 0 for none",
        least=0.0,
        most=1.0,
    )
    per_head: bool = param(True, "whether every head keeps the same share")
    probes: int = param(64, "the rows attended exactly; 0 for none", least=0)
    refresh: float = param(
        0.0,
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
    learn: str = param(
        "query",
        "what foretells the error of a row: its output alone, or its query too",
        choices=("output", "query"),
    )
    recall: int = param(
        1, "the earlier calls whose probe rows teach the repair, fading by half", least=0, most=64
    )

    def __post_init__(self) -> None:
        """Check the parameters and what they need of each other."""
        check_params(self)
        names = self.order if isinstance(self.order, tuple) else (self.order,)
        known = (*NAMES, "gilbert")
        if not names or any(n not in known and (n != "auto" or len(names) > 1) for n in names):
            expected = f"'auto', or one of {', '.join(known)}, once or per head"
            raise bad_param(self, "order", expected=expected)
        if 0 < self.block_size < 8:
            raise bad_param(self, "block_size", expected="0, or at least 8")
        if self.key_block and (self.key_block < 8 or self.block_size % self.key_block):
            expected = f"0, or a divisor of block_size ({self.block_size}) of at least 8"
            raise bad_param(self, "key_block", expected=expected)
        if self.key_block and not self.block_size:
            raise bad_param(self, "key_block", expected="0 where block_size is 0")
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
        size = self.fitted(call.grid).block_size
        if call.grid.tokens <= max(self.probes, size):
            reasons.append(
                f"metered needs more tokens than probes ({self.probes}) and than one block "
                f"({size}), got {call.grid.tokens}"
            )
        return reasons

    def fitted(self, grid: TokenGrid) -> "Metered":
        """Return the method with blocks of a size, those that suit a grid where it has none."""
        return self if self.block_size else replace(self, block_size=block_for(grid))

    @property
    def key_size(self) -> int:
        """Keys per block."""
        can_halve = self.keys == "alike" and self.block_size % 2 == 0 and self.block_size >= 16
        return self.key_block or self.block_size // (2 if can_halve else 1)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query; what was chosen stays in call.memory."""
        if self.density >= 1:
            return backend.dense(call)
        fitted = self.fitted(call.grid)
        return attend_per_item(call, lambda item: fitted._attend_item(item, backend))

    def _attend_item(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        key = f"metered {self} {call.grid} {call.head_count} {call.query.device}"
        state = call.memory.setdefault(key, State())
        starting = self.start > 0 and call.steps > 0 and call.step < self.start * call.steps
        size = self.block_size
        if state.order is None:
            names = order_names(call, self.order, size, self.rows, self.density)
            state.order = padded_order(call.grid, names, size).to(call.query.device)
        blocks = Blocks(state.order, self._keys(call, state, backend), size, self.key_size)
        stale = self._stale(call, state, starting)
        made, runs = call, None
        if self.mode != "drop" or len(stale):
            runs = blocks.runs(call)
        if runs is not None and len(stale):
            self._choose(call, state, (blocks, runs), stale, starting, backend)
        if runs is not None and self.mode != "drop":
            made = with_pooled_keys(call, runs.pooled())
        out = blocks.attend(made, backend, self._mask(call, state, blocks))
        if not self.refresh:  # the next call chooses anew: nothing this large waits for it
            state.mask = None
        if out is None:
            return backend.dense(call)
        if not self.probes:
            return out
        rows = self._rows(call)
        exact = rows_by_backend(call, backend, rows)
        if starting:  # what the rows would be if no head were held dense
            assert state.kept is not None
            found = blocks.rows(made, rows, state.kept)
        else:
            found = out.index_select(1, rows)
        return self._mended(call, backend, out, (rows, exact, found), state)

    def _keys(self, call: AttentionCall, state: State, backend: Backend) -> TokenOrder | None:
        """Return the slots of keys where they have other ones than queries."""
        if self.keys == "order":
            return None
        if state.alike is None or not cut_lasts(state.cut, call.step):
            key = ("alike keys", self.key_size)
            state.cut_anew(once(backend, key, lambda: alike_keys(call, self.key_size)), call.step)
        assert state.alike is not None
        # made anew at every call: kept, the slots would take four times the memory in every layer
        return alike_order(state.alike, call.grid, self.block_size)

    def _stale(self, call: AttentionCall, state: State, starting: bool) -> list[int]:
        """Return the heads that choose their blocks at this call."""
        every = list(range(call.head_count))
        if state.kept is None or starting or state.held is not None or not self.refresh:
            return every
        stale = state.stale(self.refresh, self.ceiling > self.density)
        if not self.per_head:  # heads under one threshold choose together, in every process
            items = call.of_all_heads(stale).view(call.items, -1).any(1).tolist()
            if call.peers is not None:  # which gather the scores of all their heads or none
                items = [any(items)] * call.items
            heads = call.method_heads // call.items
            return [at for at, place in enumerate(call.places) if items[place // heads]]
        return stale.nonzero().flatten().tolist()

    def _choose(
        self,
        call: AttentionCall,
        state: State,
        cut: tuple[Blocks, Runs],
        stale: list[int],
        starting: bool,
        backend: Backend,
    ) -> None:
        """Choose the blocks worth their cost; heads too far off get more, or all."""
        at, blocks = sent(torch.tensor(stale), call.query.device), cut[0]
        looks = self.first_look if self.carry and not state.knows(call.step) else 1
        # variants that differ in what they keep, not in what they look at, share one look
        look = (self.keys, self.score, self.mode == "drop", self.rows * looks, bool(self.carry))
        key = ("metered", *look, self.block_size, self.key_size, state.order, state.cut, *stale)
        score = once(
            backend, key, lambda: self.scores(*some_heads(call, blocks, cut[1], stale), looks)
        )
        score = score.nan_to_num(nan=0.0, posinf=0.0)  # a broken head sets no threshold
        if self.carry:
            score = state.with_scores(score, at, call.step, self.carry)
        kept = self._kept(call, score, self.density)
        if self.ceiling > self.density and state.high is not None:
            more = self._kept(call, score, self.ceiling)
            kept = torch.where(state.high[at, None, None], more, kept)
        if self.mode == "drop":
            column = torch.arange(kept.shape[2], device=kept.device)
            if blocks.keys is None:
                kept[:, column * self.key_size // self.block_size, column] = True
            else:
                kept.scatter_(2, score.argmax(2, keepdim=True), True)
        state.chosen(kept, at)
        state.held = None
        if starting:
            state.held = torch.ones_like(kept[:, 0, 0]) if state.high is None else state.high

    def _kept(self, call: AttentionCall, score: torch.Tensor, density: float) -> torch.Tensor:
        """Return bool like the scores [n, blocks, key blocks] of the heads that choose."""
        if self.per_head:
            return keep_share(score, density, True)
        if call.peers is None:  # all heads of the items that choose
            items = len(score) * call.items // call.head_count
            return keep_share(score, density, items=items)
        kept = keep_share(call.of_all_heads(score), density, items=call.items)
        return kept[list(call.places)]

    def _mask(self, call: AttentionCall, state: State, blocks: Blocks) -> BlockMask:
        """Return what runs: the blocks kept, all of them for heads that are dense for now."""
        if state.mask is None:
            assert state.kept is not None
            dense = state.dense()
            run = state.kept if dense is None else state.kept | dense[:, None, None]
            state.mask = blocks.mask(run, call.grid, self.mode != "drop")
        return state.mask

    def _rows(self, call: AttentionCall) -> torch.Tensor:
        """Return int64 [R]: this call's probe rows, other ones at every layer and step."""
        seed = 1009 * call.layer + call.step
        rows = probe_rows(call.grid.tokens, self.probes, seed) + call.grid.text_before
        return sent(rows, call.query.device)

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
            state.mask = None  # dense from the next call on
        grid, query = call.grid, call.query if self.learn == "query" else None
        fit = fit_repair(
            found,
            exact,
            query=None
            if query is None
            else torch.where(good[:, None], query.index_select(1, rows), 0.0),
            earlier=state.rows,
            ridge=self.ridge,
            rank=self.rank,
        )
        error = fit.before
        if self.mode == "repair":
            error = fit.after
            span = slice(grid.text_before, grid.text_before + grid.tokens)
            fit.apply(out, span, good if state.held is None else good & ~state.held, query)
            if self.recall:
                state.rows = fit.rows.before(state.rows, self.recall * self.probes)
        out[0, rows] = torch.where(good[:, None], exact[0].to(out.dtype), out[0, rows])
        state.note(fit.before, error > self.limit if self.limit else None)
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

    def scores(
        self, call: AttentionCall, blocks: Blocks, runs: Runs, looks: int = 1
    ) -> torch.Tensor:
        """Return float32 [H, blocks, key blocks]: what keys are worth to blocks of queries."""
        turn = call.step if self.carry else 0
        rows = min(self.rows * looks, max(self.rows, self.block_size))
        if self.score == "mass":
            return block_mass(call, blocks, rows, turn)
        return error_scores(call, blocks, runs, rows, self.mode != "drop", turn)
