"""Errors of methods on the query, key and value that a dense run of the embedded model makes."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from board_rows import Counting, CpuWatch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.methods import Method
from dittools.patches import attach
from dittools.pipelines.generate import Settings, generate
from dittools.plans import Plan


@dataclass
class Tally:
    """What one method did over a run.

    Attributes:
        method: what runs.
        apart, size: float64 by (layer, head), squared error and squared dense output, summed.
        visited, pairs: query-key pairs.
        memory: of the method, by site and branch.
    """

    method: Method
    apart: dict[int, torch.Tensor] = field(default_factory=dict)
    size: dict[int, torch.Tensor] = field(default_factory=dict)
    visited: float = 0.0
    pairs: float = 0.0
    memory: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """Runs every call dense, and some methods beside it on the same tensors."""

    name: ClassVar[str] = "beside"
    tallies: list[Tally] = field(default_factory=list)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Nothing is refused."""
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return the dense output; what the methods give is compared with it."""
        exact = backend.dense(call)
        for tally in self.tallies:
            counting = Counting(backend, CpuWatch())
            memory = tally.memory.setdefault((call.layer, call.branch), {})
            found = tally.method.attend(replace(call, memory=memory), counting)
            tally.visited += counting.visited
            tally.pairs += call.query.shape[0] * call.grid.total**2 * call.head_count
            apart = (found - exact).double().square().sum(dim=(0, 1, 3))
            size = exact.double().square().sum(dim=(0, 1, 3))
            tally.apart[call.layer] = tally.apart.get(call.layer, 0) + apart
            tally.size[call.layer] = tally.size.get(call.layer, 0) + size
        return exact


def errors_of_heads(
    pipe: Any, settings: Settings, methods: dict[str, dict[str, Method]]
) -> dict[str, Any]:
    """Return relative errors over all steps and branches of one dense run.

    Args:
        pipe: the demo pipeline.
        settings: of the run.
        methods: name -> method, by density.
    """
    tallies = {d: {n: Tally(m) for n, m in some.items()} for d, some in methods.items()}
    beside = Beside([t for some in tallies.values() for t in some.values()])
    with attach(pipe, Plan.of(beside), backend="cpu"):
        generate(pipe, settings)
    return {d: {n: _line(t) for n, t in some.items()} for d, some in tallies.items()}


def _line(tally: Tally) -> dict[str, Any]:
    layers = sorted(tally.apart)
    each = [(tally.apart[n] / tally.size[n]).sqrt() for n in layers]
    apart, size = (torch.cat([x[n] for n in layers]).sum() for x in (tally.apart, tally.size))
    return {
        "error": round(float((apart / size).sqrt()), 5),
        "median": round(float(torch.cat(each).median()), 5),
        "executed": round(tally.visited / tally.pairs, 4),
        "heads": [[round(e, 5) for e in line.tolist()] for line in each],
    }
