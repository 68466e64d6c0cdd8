"""The units of work of a search: calibrating, perturbing, and generating with a plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dittools.methods import to_params
from dittools.metrics.fidelity import compare
from dittools.patches import attach
from dittools.pipelines.generate import Run, Settings, generate
from dittools.plans import Plan, Rule
from dittools.searching.candidates import Candidate
from dittools.searching.gradient import carry_back
from dittools.searching.probe import Probe, Sites
from dittools.searching.rows import sample_rows
from dittools.searching.scout import Facts
from dittools.searching.store import Result, Store, Unit, fingerprint

FORMAT = 5  # of what a calibration keeps: older work is not taken up
_APART = 2**40  # from the seeds by which methods draw rows of their own, which they know exactly


@dataclass(frozen=True)
class Score:
    """How plans did on some generations, one entry each.

    Attributes:
        psnr_db, ssim: against the dense generation of the same prompt and seed.
        mean_square: mean squared pixel error.
        density: share of pairs computed over the run, dense steps included.
        speedups: dense over own wall time of whole generations, one after the other; empty where
            they were not timed.
    """

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    mean_square: tuple[float, ...]
    density: float
    speedups: tuple[float, ...] = ()

    @property
    def mean_psnr_db(self) -> float:
        """Mean over the generations."""
        return float(np.mean(self.psnr_db))

    @property
    def speedup(self) -> float:
        """Median over the generations."""
        return float(np.median(self.speedups))

    def to_dict(self) -> dict[str, Any]:
        """Return the score as JSON types, rounded to what a reader needs."""
        found: dict[str, Any] = {
            "psnr_db": round(self.mean_psnr_db, 4),
            "ssim": round(float(np.mean(self.ssim)), 6),
            "density": round(self.density, 6),
            "psnr_db_each": [round(v, 4) for v in self.psnr_db],
        }
        if self.speedups:
            found["speedup"] = round(self.speedup, 4)
            found["speedup_each"] = [round(v, 4) for v in self.speedups]
        return found


def sites_for(
    facts: Facts, ranges: tuple[float, ...], rows: int, per_range: int, seed: int
) -> Sites:
    """Return what a probe looks at: a few steps per range, spread evenly, and a few queries."""
    chosen = sample_rows(facts.grid.total, rows, seed ^ _APART)
    args = (facts.grid, facts.model.layers, facts.model.heads, ranges, facts.steps)
    plain = Sites(*args, frozenset(), chosen)
    by_range: dict[int, list[int]] = {}
    for step in range(facts.steps):
        by_range.setdefault(plain.range_of(step), []).append(step)
    sampled = set()
    for steps in by_range.values():
        count = min(per_range, len(steps))
        sampled |= {steps[(2 * i + 1) * len(steps) // (2 * count)] for i in range(count)}
    return Sites(*args, frozenset(sampled), chosen)


def turns(sites: Sites, prompts: int) -> list[Sites]:
    """Return what is looked at with each prompt: by turns, every other of the steps of a range.

    A step range is seen at as many steps as before, each of them with half of the prompts; a single
    prompt, and one step in a range, is looked at whole.
    """
    by_range: dict[int, list[int]] = {}
    for step in sorted(sites.sampled):
        by_range.setdefault(sites.range_of(step), []).append(step)
    share = min(prompts, 2)
    found = []
    for number in range(prompts):
        taken = {
            step
            for steps in by_range.values()
            for place, step in enumerate(steps)
            if len(steps) < share or (place - number) % share == 0
        }
        found.append(replace(sites, sampled=frozenset(taken)))
    return found


class Bench:
    """Generates with and without plans, each result kept in a store.

    Args:
        pipe: a stock pipeline, nothing attached.
        store: where results are kept.
        backend: a named one, so that every call runs what the plan says.
    """

    def __init__(self, pipe: Any, store: Store, backend: str) -> None:
        """Keep what every unit needs."""
        self.pipe, self.store, self.backend = pipe, store, backend

    def dense(self, settings: Settings) -> torch.Tensor:
        """Return the dense frames [F, H, W, 3] of a generation, made once per process."""

        return self._keep_dense(settings, lambda: generate(self.pipe, settings))

    def _keep_dense(self, settings: Settings, run: Callable[[], Run]) -> torch.Tensor:
        def make() -> Result:
            return {"frames": torch.from_numpy(run().frames.copy())}

        return self.store.once(f"dense {fingerprint(settings.to_dict())}", make)["frames"]

    def calibrate(
        self,
        settings: Sequence[Settings],
        sites: Sites,
        candidates: Sequence[Candidate],
        facts: Facts,
        carry: float | None,
        active: Sequence[int] | None = None,
        parts: int = 1,
    ) -> list[Result]:
        """Return what a probe measured in each generation, of the active candidates.

        The candidates are dealt out to so many units of work per generation.
        """
        every = range(1, len(candidates)) if active is None else active
        shares = [tuple(n for n in every if n)[part::parts] for part in range(parts)]
        names = fingerprint(
            [c.name for c in candidates],
            sites.ranges,
            sorted(sites.passed),
        )

        def measure(use: Settings, at: Sites, some: Sequence[int]) -> Result:
            probe = Probe(at, candidates, facts.gains, carry, some)
            with attach(self.pipe, Plan((Rule(probe),)), backend=self.backend, recorder=False):
                generate(self.pipe, use)
            return probe.results()

        rows, by_turns = len(sites.rows), turns(sites, len(settings))
        units = [
            Unit(
                f"calibrate {FORMAT} "
                f"{fingerprint(use.to_dict(), names, sorted(at.sampled), some, rows, carry)}",
                number * parts + part,
                lambda use=use, at=at, some=some: measure(use, at, some),  # type: ignore[misc]
            )
            for number, (use, at) in enumerate(zip(settings, by_turns, strict=True))
            for part, some in enumerate(shares)
        ]
        what = "looking at all candidates" if active is None else "measuring candidates"
        found = self.store.run(what, units)
        return [_whole(found[at : at + parts]) for at in range(0, len(found), parts)]

    def carry_back(self, settings: Sequence[Settings], sites: Sites, vectors: int) -> list[Result]:
        """Return what arrived at every head of random vectors over the final latents."""
        units = [
            Unit(
                f"gradient {fingerprint(use.to_dict(), sites.ranges, vectors)}",
                number,
                lambda use=use, n=number: carry_back(self.pipe, use, sites, vectors, n),  # type: ignore[misc]
            )
            for number, use in enumerate(settings)
        ]
        return self.store.run("going backward through the sampler", units)

    def score(
        self, what: str, plan: Plan, settings: Sequence[Settings], is_timed: bool = False
    ) -> Score:
        """Return how a plan does on some generations."""
        return self.score_all(what, [plan], settings, is_timed)[0]

    def score_all(
        self,
        what: str,
        plans: Sequence[Plan],
        settings: Sequence[Settings],
        is_timed: bool = False,
    ) -> list[Score]:
        """Return how each plan does on the same generations.

        A generation is always scored by the same process, so that its dense frames are made once;
        a single one is made by every process, and the plans are dealt out. Timed ones are set
        against a dense generation right before.
        """
        alone = len(settings) == 1
        make, kind = (self._timed, "timed score") if is_timed else (self._score, "score")
        units = [
            Unit(
                f"{kind} {plan_digest(plan)} {fingerprint(use.to_dict())}",
                place if alone else number,
                lambda plan=plan, use=use: make(plan, use),  # type: ignore[misc]
            )
            for place, plan in enumerate(plans)
            for number, use in enumerate(settings)
        ]
        found = self.store.run(what, units)
        size = len(settings)
        return [_joined(found[i * size : (i + 1) * size]) for i in range(len(plans))]

    def _score(self, plan: Plan, settings: Settings) -> Result:
        reference = self.dense(settings)
        with attach(self.pipe, plan, backend=self.backend, recorder=False) as handle:
            run = generate(self.pipe, settings)
            density = handle.report().density
        return {"score": _values(reference, run, density)}

    def _timed(self, plan: Plan, settings: Settings) -> Result:
        """Score and time a plan; both runs meet the machine in the same state.

        Kernels of a GPU are compiled at their first use, in a run that does not count.
        """
        dense = generate(self.pipe, settings)
        reference = self._keep_dense(settings, lambda: dense)
        with attach(self.pipe, plan, backend=self.backend, recorder=False) as handle:
            if str(getattr(self.pipe, "device", "cpu")) != "cpu":
                generate(self.pipe, settings)
                handle.reset()
            run = generate(self.pipe, settings)
            density = handle.report().density
        ratio = torch.tensor([dense.seconds / run.seconds], dtype=torch.float64)
        return {"score": _values(reference, run, density), "speedup": ratio}


def _values(reference: torch.Tensor, run: Run, density: float) -> torch.Tensor:
    """Return PSNR, SSIM, mean squared error and density of a run."""
    frames = reference.numpy()
    fidelity = compare(frames, run.frames)
    square = float(np.square(frames.astype(np.float64) - run.frames).mean())
    values = (fidelity.psnr_db, fidelity.ssim, square, density)
    return torch.tensor(values, dtype=torch.float64)


def _whole(parts: Sequence[Result]) -> Result:
    """Return what one probe of all candidates would have measured; each part is 0 for the rest."""
    own = ("error", "density", "computed")
    return {
        name: torch.stack([part[name] for part in parts]).sum(dim=0) if name in own else value
        for name, value in parts[0].items()
    }


def _joined(found: Sequence[Result]) -> Score:
    table = torch.stack([result["score"] for result in found])
    psnr, ssim, square = (tuple(table[:, i].tolist()) for i in range(3))
    speedups = tuple(float(result["speedup"]) for result in found if "speedup" in result)
    return Score(psnr, ssim, square, float(table[:, 3].mean()), speedups)


def plan_digest(plan: Plan) -> str:
    """Return a digest of what a plan does, its provenance left out."""
    rules = [
        (rule.layers, rule.heads, rule.steps, rule.branch, rule.method.name, _plain_params(rule))
        for rule in plan.rules
    ]
    return fingerprint(rules, vars(plan.schedule))


def _plain_params(rule: Rule) -> dict[str, Any]:
    return {
        name: value.flatten().tolist() if isinstance(value, torch.Tensor) else value
        for name, value in to_params(rule.method).items()
    }
