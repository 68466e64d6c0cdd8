"""Which blocks metered attention keeps: the order they are cut along, and what each is worth."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.methods.base import halvings
from dittools.methods.block_sampling import (
    gather_heads,
    run_length,
    sampled_mass,
    sampled_slots,
    slots_amid,
)
from dittools.methods.block_statistics import mass_recall
from dittools.methods.compensation import Runs
from dittools.methods.error_score import pooling_error
from dittools.methods.metered_blocks import Blocks
from dittools.methods.paro import NAMES, ORDER_BLOCKS, axis_order, best_order, distinct_orders
from dittools.methods.placing import placed, sent
from dittools.order import TokenOrder


def order_names(
    call: AttentionCall, order: str | tuple[str, ...], size: int, rows: int, density: float
) -> tuple[str, ...]:
    """Return the order of every head; 'auto' takes the axis order of most mass in few blocks."""
    if isinstance(order, tuple):  # places past them belong to further items of a batch
        return tuple(order[place % len(order)] for place in call.places)
    distinct = distinct_orders(call.grid)
    if order != "auto" or len(distinct) == 1:
        return (NAMES[0] if order == "auto" else order,) * call.head_count
    recalls = []
    for number in distinct:
        index = placed(axis_order(call.grid, number), call.query.device)[None]
        mass = _mass(call, index, size, rows, run_length(size), blocks=ORDER_BLOCKS)
        recalls.append(mass_recall(mass, density))
    return tuple(NAMES[distinct[place]] for place in best_order(torch.stack(recalls)))


def some_heads(
    call: AttentionCall, blocks: Blocks, runs: Runs, which: Sequence[int]
) -> tuple[AttentionCall, Blocks, Runs]:
    """Return a call of batch 1, its blocks and runs for some heads, to look at and not to run."""
    if len(which) == call.head_count:
        return call, blocks, runs
    at = sent(torch.tensor(which), call.query.device)
    bias = call.key_bias
    looked_at = replace(
        call,
        query=call.query.index_select(2, at),
        key=call.key.index_select(2, at),
        value=call.value.index_select(2, at),
        key_bias=bias if bias is None or bias.shape[1] == 1 else bias.index_select(1, at),
        unrotated=None,
        memory={},
        head_index=(),
        peers=None,
        items=1,
    )
    key, value, weight = (x if len(x) == 1 < call.head_count else x[at] for x in runs)
    return looked_at, blocks.of_heads(at), Runs(key, value, weight)


def error_scores(
    call: AttentionCall,
    blocks: Blocks,
    runs: Runs,
    rows: int,
    pooled: bool,
    turn: int = 0,
) -> torch.Tensor:
    """Return float32 [H, blocks, key blocks]: the error of skipping each block of keys.

    Args:
        call: of batch 1.
        blocks: what they are cut from.
        runs: of its keys and values.
        rows: queries per block that stand for it.
        pooled: whether skipped blocks are replaced by their means.
        turn: looks at other queries, as `slots_amid` says.
    """
    tokens, size, order = call.grid.tokens, blocks.size, blocks.order
    count = -(-tokens // size)
    slots = sampled_slots(tokens, size, rows, turn=turn)
    each = len(slots) // count
    if len(slots) != each * count:  # a short last block has fewer to show: some stand twice
        start = torch.arange(0, tokens, size)
        sizes = (tokens - start).clamp(max=size)
        slots = (start[:, None] + slots_amid(sizes, rows, turn)).flatten()
        each = rows
    index = order.index[:, sent(slots, order.index.device)]
    query = gather_heads(call.query[0], index)
    text = _text_scores(call, query)
    return pooling_error(query, runs, text, call.softmax_scale, each, pooled)


def block_mass(call: AttentionCall, blocks: Blocks, rows: int, turn: int = 0) -> torch.Tensor:
    """Return float32 [H, blocks, key blocks]: attention mass, as PARO estimates it."""
    index = _without_padding(blocks.order, call.grid, blocks.size)
    keys = None if blocks.keys is None else _without_padding(blocks.keys, call.grid, blocks.size)
    return _mass(
        call,
        index,
        blocks.size,
        rows,
        blocks.run,
        turn=turn,
        key_block=blocks.key_size,
        key_index=keys,
    )


def _mass(
    call: AttentionCall, index: torch.Tensor, size: int, rows: int, run: int, **more: Any
) -> torch.Tensor:
    bias = call.additive_mask()
    return sampled_mass(
        call.query[0],
        call.key[0],
        index,
        call.grid.tokens,
        size,
        call.softmax_scale,
        rows=rows,
        run=run,
        bias=None if bias is None else bias[0],
        **more,
    )


def _without_padding(order: TokenOrder, grid: TokenGrid, size: int) -> torch.Tensor:
    """Return int64 [H or 1, total]: the tokens of a `padded_order`, the text last."""
    text = -(-grid.tokens // size) * size + torch.arange(grid.text)
    slots = torch.cat((torch.arange(grid.tokens), text))
    return order.index.index_select(1, sent(slots, order.index.device))


def _text_scores(call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
    """Return float32 [H, n]: log-sum-exp of the scores of text keys, -inf without any."""
    grid = call.grid
    token = torch.arange(grid.total)
    at = torch.cat((token[: grid.text_before], token[grid.text_before + grid.tokens :]))
    if not len(at):
        return query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    at = sent(at, query.device)
    before, after = halvings(call.softmax_scale)
    scores = (query * before @ call.key[0, at].permute(1, 2, 0)).float() * after
    bias = call.additive_mask()
    if bias is not None:
        scores = scores + bias[0][:, None, at]
    return scores.logsumexp(-1)
