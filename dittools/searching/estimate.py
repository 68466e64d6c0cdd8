"""What a search will cost, worked out from one short generation before it starts."""

from dataclasses import asdict, dataclass
from typing import Any

from dittools.searching.candidates import Candidate
from dittools.searching.comparing import FLAT_BLENDS
from dittools.searching.probe import BRANCHES, CHUNK
from dittools.searching.request import Request
from dittools.searching.run import LOOKERS, looks_first, prepare
from dittools.searching.scout import Facts
from dittools.searching.weigh import sampled_layers

_PROBE_RATE = 2e10  # multiply-adds a second in skinny masked products, per process
_FRAME_BYTES = 12  # three channels in fp32


@dataclass(frozen=True)
class Estimate:
    """Counts, and what follows from them.

    Attributes:
        candidates: methods with their parameters, dense left out.
        generations: complete ones, by what they are for; verification at most.
        forwards: of the denoiser, at most.
        seconds: wall time of one process, at most.
        memory_bytes: beyond the model itself, at the peak.
        disk_bytes: of the work folder.
    """

    candidates: int
    generations: dict[str, int]
    forwards: int
    seconds: float
    memory_bytes: int
    disk_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """Return four lines."""
        parts = ", ".join(f"{count} {name}" for name, count in self.generations.items())
        return "\n".join(
            [
                f"candidates  {self.candidates}",
                f"forwards    at most {self.forwards} in {sum(self.generations.values())} "
                f"generations ({parts})",
                f"time        about {self.seconds / 60:.1f} minutes with one process",
                f"memory      {self.memory_bytes / 2**20:.0f} MiB beside the model, "
                f"{self.disk_bytes / 2**20:.0f} MiB on disk",
            ]
        )


def estimate(pipe: Any, request: Request) -> Estimate:
    """Return what a search will cost; runs three denoising steps to find out."""
    facts, candidates = prepare(pipe, request)
    return estimate_from(request, facts, candidates)


def estimate_from(request: Request, facts: Facts, candidates: list[Candidate]) -> Estimate:
    """Return what a search will cost on a model whose facts are known."""
    budget, ranges = request.budget, len(request.ranges) - 1
    calibration, held_out = len(request.calibration), len(request.held_out)
    layers = sampled_layers(
        facts.model.layers, budget.sensitivity, request.constraints.dense_layers
    )
    plans = 1 + any(c.together for c in candidates) + len(FLAT_BLENDS)
    singles = min(budget.points, len(candidates) - 1)
    generations = {
        "dense": calibration + held_out,
        "calibration": calibration,
        "sensitivity": len(layers) + min(ranges, facts.steps),
        "weights": (plans + budget.branches) * calibration,
        "verification": budget.rounds * held_out,
        "single methods": singles * held_out,
    }
    if request.target == "speedup":
        generations["dense, timed"] = (budget.rounds + singles) * held_out
    sampled = min(facts.steps, ranges * budget.steps_per_range) * max(1, len(facts.branches))
    calls = -(-calibration // min(calibration, 2)) * sampled * facts.model.layers
    rows = min(budget.rows, facts.grid.total)
    per_call = rows * facts.grid.total * facts.model.heads * (facts.model.head_dim + 4)
    probing = calls * len(candidates) * per_call / _PROBE_RATE
    if looks_first(request, candidates):
        generations["first look"] = LOOKERS
    total = sum(generations.values())
    cells = facts.model.layers * ranges * len(BRANCHES) * facts.model.heads * len(candidates)
    kept_rows = len(candidates) * rows * facts.grid.total
    chunk = 4 * min(rows, CHUNK) * facts.grid.total * facts.model.heads * 4
    frame = (request.settings.height or 512) * (request.settings.width or 512) * _FRAME_BYTES
    clip = frame * (request.settings.frames or 1)
    masks = sum(c.mask_bytes for c in candidates)
    return Estimate(
        len(candidates) - 1,
        generations,
        total * facts.steps * max(1, len(facts.branches)),
        total * facts.seconds + probing,
        kept_rows + chunk + masks + 8 * cells * 3 + 2 * clip,
        8 * cells * calibration + clip * (calibration + held_out),
    )
