"""What a call of metered attention costs beyond the blocks it attends, at 32 thousand tokens."""

import time
from collections.abc import Callable
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.auto import resolve
from dittools.methods import build
from dittools.methods.compensation import block_mask, padded_order, with_pooled_keys
from dittools.methods.metered_blocks import Blocks, alike_keys, alike_order
from dittools.methods.metered_choice import order_names
from dittools.methods.metered_state import State
from dittools.methods.probes import rows_by_backend
from dittools.methods.repair import fit_repair
from dittools.methods.selection import keep_share

GRID = TokenGrid(20, 40, 40, 0, 77)
WIDTH = 128
DENSITY = 0.2
ALIKE = {"keys": "alike", "rows": 8}  # with blocks of half as many keys


def _seconds(work: Callable[[], object], times: int = 3) -> float:
    """Return the median CPU seconds of this thread."""
    work()
    found = []
    for _ in range(times):
        start = time.thread_time()
        work()
        found.append(time.thread_time() - start)
    return sorted(found)[times // 2]


def costs() -> dict[str, Any]:
    """Return shares of a dense call of one head, by dtype and block size."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in (64, 128):
            lines.append(_line(dtype, {"block_size": size}))
        halves = {"block_size": 128, "key_block": 64}
        lines += [_line(dtype, halves), _line(dtype, {**halves, **ALIKE})]
    return {"tokens": GRID.total, "head_dim": WIDTH, "density": DENSITY, "lines": lines}


def _line(dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, GRID.total, 1, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    call, backend = AttentionCall(q, k, v, GRID, steps=12), resolve("cpu")
    method: Any = build("metered", {"density": DENSITY, **given})
    size = method.block_size
    dense = _seconds(lambda: backend.dense(call), 3)

    def share(work: Callable[[], object]) -> float:
        return _seconds(work) / dense

    def names() -> tuple[str, ...]:
        return order_names(call, "auto", size, method.rows, DENSITY)

    order = padded_order(GRID, names(), size)
    alike = alike_keys(call, method.key_size) if method.keys == "alike" else None
    keys = None if alike is None else alike_order(alike, GRID, size)
    blocks = Blocks(order, keys, size, method.key_size)
    runs = blocks.runs(call)
    kept = keep_share(method.scores(call, blocks, runs), DENSITY, True)
    made = with_pooled_keys(call, runs.pooled())
    own = block_mask(kept, GRID, order, size, False, method.key_size)
    tail = blocks.mask(kept, GRID, True)
    rows = method._rows(call)
    exact = rows_by_backend(call, backend, rows)
    out = blocks.attend(made, backend, tail)
    assert out is not None
    found = out.index_select(1, rows)
    state = State()

    def chosen() -> object:
        score = method.scores(call, blocks, runs)
        score = state.with_scores(score, torch.zeros(1, dtype=torch.int64), 0, method.carry)
        return blocks.mask(keep_share(score, DENSITY, True), GRID, True)

    asked = call.query.index_select(1, rows)
    earlier = fit_repair(found, exact, query=asked, rank=0).rows.before(None, len(rows))

    def mended() -> None:
        fit = fit_repair(found, exact, query=asked, earlier=earlier, rank=0)
        fit.apply(out, slice(0, GRID.tokens), query=call.query)

    with_tail = share(lambda: blocks.attend(made, backend, tail))
    alone = share(lambda: backend.block_sparse(call, own, return_lse=True))
    parts = {
        "blocks": alone,
        "pooled tail": with_tail - alone,
        "pooling": share(lambda: with_pooled_keys(call, blocks.runs(call).pooled())),
        "choosing": share(chosen),
        "probe rows": share(lambda: rows_by_backend(call, backend, rows)),
        "repair": share(mended),
        "order, once a run": share(names),
        "alike keys, at few steps": 0.0
        if alike is None
        else share(lambda: alike_keys(call, method.key_size)),
    }
    rare = ("blocks", "order, once a run", "alike keys, at few steps")
    added = sum(v for n, v in parts.items() if n not in rare)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": size,
        "key_block": method.key_size,
        "keys": method.keys,
        "dense_s": round(dense, 3),
        "parts": {name: round(value, 5) for name, value in parts.items()},
        "added": round(added, 5),
    }
