"""The search from end to end: scout, calibrate, weigh, allocate, verify."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dittools.errors import InputError
from dittools.patches.attach import find_targets
from dittools.plans import Plan
from dittools.searching.allocate import Unreachable
from dittools.searching.candidates import Candidate, candidates_for, without
from dittools.searching.cost import CostTable, flops_table, measure_costs
from dittools.searching.measure import Bench, Score, sites_for
from dittools.searching.points import Watch, curve_points, single_points, trial_point
from dittools.searching.request import Request
from dittools.searching.scout import Facts, named_backend, scout
from dittools.searching.solver import Predictor, Solution, Solver
from dittools.searching.store import Result, Store, Unit, fingerprint, weights_digest
from dittools.searching.table import Table, flat_weights, merge
from dittools.searching.verify import DENSITY_SLACK, Trial, Verdict, Verifier
from dittools.searching.weigh import Sensitivity, measure_sensitivity, sampled_layers

Report = Callable[[str, int, int], None]
BLENDS = (1.0, 0.5, 0.0)  # measured weights, half-way, flat: isolated perturbations can mislead
_REFERENCE_DENSITY = 0.35  # where the blends are compared when no density is asked for


@dataclass(frozen=True)
class Outcome:
    """Everything a search found out; `report` and `inspect` draw it."""

    request: Request
    facts: Facts
    table: Table
    solver: Solver
    predictor: Predictor
    sensitivity: Sensitivity
    blend: float
    blends: dict[float, float]
    verdict: Verdict
    singles: list[tuple[int, Score]]
    plan: Plan


def work_folder(pipe: Any, parent: Path | None, backend: str) -> Path | None:
    """Return the folder of results that hold for this model, backend and these versions."""
    if parent is None:
        return None
    targets = find_targets(pipe)
    scheduler = getattr(getattr(pipe, "scheduler", None), "config", {})
    parts = [weights_digest(t.denoiser) for t in targets]
    mark = fingerprint(versions(), type(pipe).__name__, parts, dict(scheduler), backend)
    folder = parent / mark
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {parent}", got=error.strerror or str(error), remedy="another folder"
        ) from error
    return folder


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    import dittools

    found = {"dittools": dittools.__version__}
    for name in ("torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def prepare(pipe: Any, request: Request) -> tuple[Facts, list[Candidate]]:
    """Return the facts of the model and the candidates of its grid.

    Raises:
        InputError: a constraint names a layer or head the model does not have.
    """
    facts = scout(pipe, request.calibration[0])
    limits = request.constraints
    bad = [n for n in limits.dense_layers if not 0 <= n < facts.model.layers]
    bad_heads = [
        pair
        for pair in limits.dense_heads
        if not (0 <= pair[0] < facts.model.layers and 0 <= pair[1] < facts.model.heads)
    ]
    if bad or bad_heads:
        raise InputError(
            "a constraint names a layer or head the model does not have",
            expected=f"layers below {facts.model.layers}, heads below {facts.model.heads}",
            got=", ".join(map(str, [*bad, *bad_heads])),
        )
    candidates = without(candidates_for(facts.grid, request.methods), limits.exclude)
    if len(candidates) < 2:
        raise InputError(
            f"no candidate is left on a grid of {facts.grid.shape}",
            remedy="fewer excluded methods, or a larger size",
        )
    return facts, candidates


def cost_table(
    store: Store, facts: Facts, candidates: list[Candidate], backend: str, device: torch.device
) -> CostTable:
    """Return kernel times of the candidates' block sizes, measured once per work folder."""
    blocks = sorted(
        {int(b) for c in candidates if (b := getattr(c.method, "block_size", 0))} or {128}
    )

    def make() -> Result:
        table = measure_costs(
            facts.grid,
            facts.model.heads,
            facts.model.head_dim,
            backend=backend,
            device=device,
            dtype=facts.dtype,
            blocks=tuple(blocks),
        )
        table = replace(table, attention_share=facts.attention_share, seconds=facts.seconds)
        return {
            "json": torch.frombuffer(
                bytearray(json.dumps(table.to_dict()).encode()), dtype=torch.uint8
            )
        }

    key = f"cost {facts.grid} {facts.model.heads} {facts.model.head_dim} {facts.dtype} {blocks}"
    found = store.run("timing kernels", [Unit(f"{key} {facts.steps}", 0, make)])[0]["json"]
    return CostTable.from_dict(json.loads(found.numpy().tobytes()))


def run(
    pipe: Any,
    request: Request,
    work: Path | None,
    backend: str,
    report: Report,
    watch: Watch = lambda *_: None,
) -> Outcome:
    """Return the outcome of a search; see `dittools.search`."""
    backend = named_backend(pipe, backend)
    store = Store(work_folder(pipe, work, backend), report)
    facts, candidates = prepare(pipe, request)
    bench = Bench(pipe, store, backend)
    budget = request.budget
    sites = sites_for(
        facts, request.ranges, budget.rows, budget.steps_per_range, request.settings.seed
    )
    results = bench.calibrate(request.calibration, sites, candidates, facts, request.carry)
    table = merge(results, candidates, sites)
    device = torch.device(getattr(pipe, "device", "cpu"))
    costs = cost_table(store, facts, candidates, backend, device)
    first = Solver(
        table,
        flat_weights(table),
        costs,
        request.constraints,
        facts.model,
        by_time=request.target == "speedup",
    )
    start = _start(first, request)
    layers = sampled_layers(
        facts.model.layers, budget.sensitivity, request.constraints.dense_layers
    )
    choice = first.solve(start).choice
    sensitivity = measure_sensitivity(
        bench, table, choice, facts.model, request.calibration[:1], layers
    )
    solver, predictor, blend, tried = _best_blend(bench, first, sensitivity, request, start)
    watch("curve", curve_points(solver, predictor))
    watch("singles", single_points(solver, predictor, {}))
    verdict = _verify(bench, solver, predictor, request, start, watch)
    singles = _singles(bench, solver, verdict.chosen.solution.density, request)
    plan = _signed(verdict, request, costs, facts)
    return Outcome(
        request, facts, table, solver, predictor, sensitivity, blend, tried, verdict, singles, plan
    )


def _start(solver: Solver, request: Request) -> float:
    """Return the budget the target asks for; for a PSNR the one the weights are compared at.

    Raises:
        InputError: no plan within the constraints is that sparse or that fast.
    """
    if request.target == "psnr":
        start = _REFERENCE_DENSITY
        try:
            solver.solve(start)
        except Unreachable as error:
            return min(error.least * 1.02, 1.0)
        return start
    share = solver.costs.attention_share
    if request.target == "density":
        start, words = request.value, "a density of at least {:.3f}"
    else:
        start = 1 - (1 - 1 / request.value) / share if share > 0 else -1.0
        words = "a speed-up of at most {:.2f}"
    try:
        solver.solve(max(start, 0.0))
    except Unreachable as error:
        least = error.least
        reach = least if request.target == "density" else 1 / (1 - share * (1 - least))
        raise InputError(
            f"the target {request.target} is out of reach",
            expected=words.format(reach) + " with these methods and constraints",
            got=f"{request.value:g}",
            remedy="more methods, fewer pinned layers or heads, or a looser target",
        ) from error
    return max(start, 0.0)


def _best_blend(
    bench: Bench, first: Solver, sensitivity: Sensitivity, request: Request, start: float
) -> tuple[Solver, Predictor, float, dict[float, float]]:
    """Return the solver whose joint plan does best on the calibration prompts, and its predictor.

    Isolated perturbations do not add up, so the weights are tried as they are, flattened half-way,
    and flat; the joint runs also fix the scale of predicted errors.
    """
    flat = flat_weights(first.table)
    solvers = {b: replace(first, weight=sensitivity.blended(flat, b)) for b in BLENDS}
    solutions = {b: solver.solve(start) for b, solver in solvers.items()}
    scores = bench.score_all(
        "comparing weights", [solutions[b].plan for b in BLENDS], request.calibration
    )
    tried = {b: score.mean_psnr_db for b, score in zip(BLENDS, scores, strict=True)}
    blend = max(BLENDS, key=lambda b: tried[b])
    predictor = Predictor.fitted(solutions[blend].loss, tried[blend])
    return solvers[blend], predictor, blend, tried


def _verify(
    bench: Bench,
    solver: Solver,
    predictor: Predictor,
    request: Request,
    start: float,
    watch: Watch,
) -> Verdict:
    verifier = Verifier(
        bench,
        solver,
        predictor,
        request.held_out,
        request.budget.rounds,
        lambda trial: watch("trial", trial_point(trial)),
    )
    if request.target == "psnr":
        return verifier.at_least(request.value)
    if request.target == "density":
        return verifier.within(start, lambda trial: trial.score.density, DENSITY_SLACK)
    return verifier.within(start, lambda trial: trial.solution.cost, 1e-9)


def _singles(
    bench: Bench, solver: Solver, density: float, request: Request
) -> list[tuple[int, Score]]:
    """Return scores of single methods on the held-out prompts, those nearest in density first."""
    ranked = sorted(
        (abs(c.density - density), number, c.method.name)
        for number, c in enumerate(solver.table.candidates)
        if number and getattr(c.method, "mode", "") != "skip"
    )
    nearest: dict[str, int] = {}
    for _, number, name in ranked:
        nearest.setdefault(name, number)
    chosen = list(nearest.values())
    chosen += [number for _, number, _ in ranked if number not in chosen]
    chosen = chosen[: request.budget.points]
    plans = [solver.single(number).plan for number in chosen]
    scores = bench.score_all("generating with single methods", plans, request.held_out)
    return list(zip(chosen, scores, strict=True))


def _signed(verdict: Verdict, request: Request, costs: CostTable, facts: Facts) -> Plan:
    """Return the plan with where it comes from and what was measured; no times, no dates."""
    chosen: Trial = verdict.chosen
    solution: Solution = chosen.solution
    provenance = {
        "by": "dittools.search",
        "versions": versions(),
        "target": {request.target: request.value},
        "met": verdict.met,
        "settings": {k: v for k, v in request.settings.to_dict().items() if k != "prompt"},
        "grid": list(facts.grid.shape),
        "calibration": [s.prompt for s in request.calibration],
        "held_out": [s.prompt for s in request.held_out],
        "cost_basis": costs.basis,
    }
    measured = {
        "density": round(chosen.score.density, 6),
        "predicted_density": round(solution.density, 6),
        "predicted_psnr_db": round(chosen.predicted_db, 4),
        "held_out": chosen.score.to_dict(),
    }
    return replace(solution.plan, provenance=provenance, measured=measured)


def plain_costs(facts: Facts) -> CostTable:
    """Return the FLOPs fallback for a model at one size."""
    return flops_table(facts.grid, facts.model.heads, facts.model.head_dim)
