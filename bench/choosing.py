"""What dynamic methods spend on choosing, next to dense attention: CPU time of one thread.

    python bench/choosing.py [--methods paro,psa] [--grid 32,32,32] [--dtype bfloat16,float32]
                             [--head-dim 64,128] [--rounds 5] [--out docs/results/choosing.json]

Choosing is all that a call does outside of the backend, which here only fills its result, off the
clock. Dense attention is timed in turn with it, so that a busy machine disturbs both alike; the
ratio is that of the medians. "first" is the first sparse step of a run, "later" one before its
half and "late" one after it. Methods that change from layer to layer give the mean of a cycle.
"asked" is what the call wants of the backend, in dense calls: above 1 where a method tries patterns
out, which then counts as choosing too. A name may be that of a method's setting: svg_ear, svoo.

With --out the rows replace those of the same method, dtype, head_dim and grid in a JSON file.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.methods import METHODS, GridMethod, build

CHOOSES = {"sparse_vdit"}  # offers masks by grid too, but picks among them by query and key
NOT_FOR_USE = {"dense", "random", "oracle"}
LAYERS = {"vmoba": (0, 1, 2)}  # its blocks cycle over the layers; the mean of a cycle is told
STEPS = {"first": 0, "later": 1, "late": 8}  # of 10


class Nothing:
    """A backend that answers with ones, laid out as the CPU kernel would, and notes the calls.

    Its own time is told apart from that of choosing.

    Attributes:
        seconds: CPU time it took. A kernel writes its result too: memory that nobody has written
            would be mapped by whoever reads it first.
    """

    name = "nothing"

    def __init__(self, tokens: int) -> None:
        """Start with nothing asked, of calls of so many tokens."""
        self._tokens = tokens
        self._calls: list[tuple[int, float, BlockMask | None]] = []
        self.seconds = 0.0

    @property
    def asked(self) -> float:
        """Blocks asked for, in dense calls of one head."""
        return sum(
            heads * pairs * (m.computed if m is not None else 1) for heads, pairs, m in self._calls
        )

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Everything is."""
        return []

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Never."""
        return False

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return ones."""
        self._calls.append((call.head_count, 1.0, None))
        return self._ones(call.query.shape, call.query.dtype)

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return ones."""
        pairs = call.query.shape[1] * call.key.shape[1] / self._tokens**2
        self._calls.append((call.head_count, pairs, mask))
        out = self._ones(call.query.shape, call.query.dtype)
        return (out, self._ones(out.shape[:3], torch.float32)) if return_lse else out

    def _ones(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        start = time.thread_time()
        made = torch.ones(shape, dtype=dtype)
        self.seconds += time.thread_time() - start
        return made


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(
    name: str, grid: TokenGrid, heads: int, dim: int, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Return the ratios of one method, and the dense seconds they are ratios to."""
    method = build(name, {})
    generator = torch.Generator().manual_seed(0)
    shape = (1, grid.total, heads, dim)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    across = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    times: dict[str, list[float]] = {"dense": [], **{name: [] for name in STEPS}}
    asked: dict[str, float] = {}
    layers = LAYERS.get(method.name, (1,))
    row: dict[str, Any] = {
        "method": name,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": dim,
        "grid": [*grid.shape],
    }
    reasons = method.not_supported(AttentionCall(q, k, v, grid))
    if reasons:
        return row | {"refused": ", ".join(reasons)}
    for turn in range(rounds + 1):  # the first one warms caches of the grid
        memories: dict[int, dict[str, object]] = {layer: {} for layer in layers}
        found = {"dense": cpu_seconds(lambda: F.scaled_dot_product_attention(*across))}
        for step_name, step in STEPS.items():
            backend, spent = Nothing(grid.total), 0.0
            for layer, memory in memories.items():
                call = AttentionCall(q, k, v, grid, layer=layer, step=step, steps=10, memory=memory)
                spent += cpu_seconds(lambda c=call, b=backend: method.attend(c, b))  # type: ignore[misc]
            found[step_name] = (spent - backend.seconds) / len(layers)
            asked[step_name] = backend.asked / heads / len(layers)
        if turn:
            for step_name, seconds in found.items():
                times[step_name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return row | {
        **{name: round(medians[name] / medians["dense"], 4) for name in STEPS},
        "asked": round(asked["first"], 3),
        "dense_s": round(medians["dense"], 3),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a result file, in place of those of the same case."""

    def case(row: dict[str, Any]) -> tuple[object, ...]:
        return row["method"], row["dtype"], row["head_dim"], tuple(row["grid"])

    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {case(row) for row in rows}
    rows = sorted([row for row in kept if case(row) not in new] + rows, key=case)
    head = {
        "what": "choosing over dense attention, CPU time of one thread",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


def main() -> None:
    """Measure and print one row per method, dtype and head_dim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="", help="names, comma-separated; all dynamic ones")
    parser.add_argument("--grid", default="32,32,32", help="frames,height,width in tokens")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", default="64", help="one or more, comma-separated")
    parser.add_argument("--dtype", default="float32", help="one or more, comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the JSON file to put the rows into")
    options = parser.parse_args()
    torch.set_num_threads(1)
    frames, height, width = (int(part) for part in options.grid.split(","))
    names = [n for n in options.methods.split(",") if n] or [
        name
        for name in METHODS
        if name not in NOT_FOR_USE
        and (name in CHOOSES or not isinstance(build(name, {}), GridMethod))
    ]
    grid = TokenGrid(frames, height, width)
    for dtype in options.dtype.split(","):
        for dim in options.head_dim.split(","):
            for name in names:
                row = measure(
                    name, grid, options.heads, int(dim), getattr(torch, dtype), options.rounds
                )
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
                if options.out:
                    write(options.out, [row])


if __name__ == "__main__":
    main()
