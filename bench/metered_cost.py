"""What a call of metered attention costs beyond the blocks it attends, at 32 thousand tokens."""

import time
from collections.abc import Callable
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels.auto import resolve
from dittools.methods import build
from dittools.methods.block_sampling import run_length
from dittools.methods.compensation import block_mask, padded_order, pool_runs, with_pooled_keys
from dittools.methods.metered_choice import order_names
from dittools.methods.probes import rows_by_backend
from dittools.methods.repair import fit_repair
from dittools.methods.selection import keep_share

GRID = TokenGrid(20, 40, 40, 0, 77)
WIDTH = 128
DENSITY = 0.2


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
            lines.append(_line(dtype, size))
    return {"tokens": GRID.total, "head_dim": WIDTH, "density": DENSITY, "lines": lines}


def _line(dtype: torch.dtype, size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, GRID.total, 1, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    call, backend = AttentionCall(q, k, v, GRID, steps=12), resolve("cpu")
    method: Any = build("metered", {"density": DENSITY, "block_size": size})
    blocks = -(-GRID.tokens // size)
    dense = _seconds(lambda: backend.dense(call), 3)

    def share(work: Callable[[], object]) -> float:
        return _seconds(work) / dense

    def names() -> tuple[str, ...]:
        return order_names(call, "auto", size, method.rows, DENSITY)

    order = padded_order(GRID, names(), size)
    runs = pool_runs(call, order, blocks, size, run_length(size))
    kept = keep_share(method.scores(call, order, runs), DENSITY, True)
    made = with_pooled_keys(call, runs.pooled())
    tail, own = (block_mask(kept, GRID, order, size, pooled) for pooled in (True, False))
    rows = method._rows(call)
    exact = rows_by_backend(call, backend, rows)
    out = backend.block_sparse(made, tail, return_lse=True)[0]
    found = out.index_select(1, rows)

    def chosen() -> object:
        score = method.scores(call, order, runs)
        return block_mask(keep_share(score, DENSITY, True), GRID, order, size, True)

    asked = call.query.index_select(1, rows)
    earlier = fit_repair(found, exact, query=asked, rank=0).rows.before(None, len(rows))

    def mended() -> None:
        fit = fit_repair(found, exact, query=asked, earlier=earlier, rank=0)
        fit.apply(out, slice(0, GRID.tokens), query=call.query)

    with_tail = share(lambda: backend.block_sparse(made, tail, return_lse=True))
    alone = share(lambda: backend.block_sparse(call, own, return_lse=True))
    parts = {
        "blocks": alone,
        "pooled tail": with_tail - alone,
        "pooling": share(
            lambda: with_pooled_keys(
                call, pool_runs(call, order, blocks, size, run_length(size)).pooled()
            )
        ),
        "choosing": share(chosen),
        "probe rows": share(lambda: rows_by_backend(call, backend, rows)),
        "repair": share(mended),
        "order, once a run": share(names),
    }
    added = sum(v for n, v in parts.items() if n not in ("blocks", "order, once a run"))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": size,
        "dense_s": round(dense, 3),
        "parts": {name: round(value, 5) for name, value in parts.items()},
        "added": round(added, 5),
    }
