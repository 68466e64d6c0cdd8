"""What dynamic methods spend on choosing, next to dense attention: CPU time of one thread.

    python bench/choosing.py [--methods paro,psa] [--grid 32,32,32] [--dtype bfloat16] [--rounds 5]

Choosing is all that a call does outside of the backend, which here returns at once. Dense attention
is timed in turn with it, so that a busy machine disturbs both alike; the ratio is that of the
medians. "first" is the first sparse step of a run, "later" one before its half and "late" one after
it. Methods that change from layer to layer give the mean of a cycle. "asked" is what the call wants
of the backend, in dense calls: above 1 where a method tries patterns out, which then counts as
choosing too.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.mask import BlockMask
from dittools.methods import METHODS, GridMethod, Method, build

CHOOSES = {"sparse_vdit"}  # offers masks by grid too, but picks among them by query and key
NOT_FOR_USE = {"dense", "random", "oracle"}
LAYERS = {"vmoba": (0, 1, 2)}  # its blocks cycle over the layers; the mean of a cycle is told
STEPS = {"first": 0, "later": 1, "late": 8}  # of 10


class Nothing:
    """A backend that answers at once, in memory laid out as the CPU kernel's, and notes the calls.

    Nothing is worked out while it answers: that would count as choosing.
    """

    name = "nothing"

    def __init__(self) -> None:
        """Start with nothing asked."""
        self._calls: list[tuple[int, float, BlockMask | None]] = []

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
        """Return memory as it comes: writing to it would count as choosing."""
        self._calls.append((call.head_count, 1.0, None))
        return torch.empty(call.query.shape, dtype=call.query.dtype)

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return memory as it comes: writing to it would count as choosing."""
        pairs = call.query.shape[1] * call.key.shape[1] / call.grid.total**2
        self._calls.append((call.head_count, pairs, mask))
        out = torch.empty(call.query.shape, dtype=call.query.dtype)
        return (out, torch.empty(out.shape[:3])) if return_lse else out


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(
    method: Method, grid: TokenGrid, heads: int, dim: int, dtype: torch.dtype, rounds: int
) -> dict[str, float | str]:
    """Return the ratios of one method, and the dense seconds they are ratios to."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, grid.total, heads, dim)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    across = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    times: dict[str, list[float]] = {"dense": [], **{name: [] for name in STEPS}}
    asked: dict[str, float] = {}
    layers = LAYERS.get(method.name, (1,))
    reasons = method.not_supported(AttentionCall(q, k, v, grid))
    if reasons:
        return {"method": method.name, "refused": ", ".join(reasons)}
    for turn in range(rounds + 1):  # the first one warms caches of the grid
        memories: dict[int, dict[str, object]] = {layer: {} for layer in layers}
        found = {"dense": cpu_seconds(lambda: F.scaled_dot_product_attention(*across))}
        for name, step in STEPS.items():
            backend, spent = Nothing(), 0.0
            for layer, memory in memories.items():
                call = AttentionCall(q, k, v, grid, layer=layer, step=step, steps=10, memory=memory)
                spent += cpu_seconds(lambda c=call, b=backend: method.attend(c, b))  # type: ignore[misc]
            found[name] = spent / len(layers)
            asked[name] = backend.asked / heads / len(layers)
        if turn:
            for name, seconds in found.items():
                times[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {name: round(medians[name] / medians["dense"], 4) for name in STEPS}
    return {
        "method": method.name,
        **ratios,
        "asked": round(asked["first"], 3),
        "dense_s": round(medians["dense"], 3),
    }


def main() -> None:
    """Measure and print one row per method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="", help="names, comma-separated; all dynamic ones")
    parser.add_argument("--grid", default="32,32,32", help="frames,height,width in tokens")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    frames, height, width = (int(part) for part in options.grid.split(","))
    names = [n for n in options.methods.split(",") if n] or [
        name
        for name in METHODS
        if name not in NOT_FOR_USE
        and (name in CHOOSES or not isinstance(build(name, {}), GridMethod))
    ]
    for name in names:
        row = measure(
            build(name, {}),
            TokenGrid(frames, height, width),
            options.heads,
            options.head_dim,
            getattr(torch, options.dtype),
            options.rounds,
        )
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
