"""The search from end to end: scout, calibrate, weigh, allocate, verify."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dittools.errors import InputError
from dittools.patches.attach import find_targets
from dittools.pipelines.output import disk_errors
from dittools.plans import Plan
from dittools.searching.candidates import Candidate, candidates_for, is_chooser, phrase, without
from dittools.searching.comparing import best_blend
from dittools.searching.cost import CostTable, flops_table, measure_costs
from dittools.searching.gradient import gradient_weights
from dittools.searching.groups import ends_of
from dittools.searching.measure import Bench, Score, sites_for
from dittools.searching.points import Watch, curve_points, single_points, trial_point
from dittools.searching.probe import Sites
from dittools.searching.request import Constraints, Request
from dittools.searching.scout import Facts, named_backend, scout
from dittools.searching.solver import Predictor, Solution, Solver
from dittools.searching.store import Result, Store, Unit, fingerprint, weights_digest
from dittools.searching.table import Table, flat_weights, merge, survivors
from dittools.searching.verify import Goal, Trial, Verdict, Verifier
from dittools.searching.weigh import Sensitivity, measure_sensitivity, sampled_layers

Report = Callable[[str, int, int], None]
NEAR = 0.03  # a single method that costs another share of dense does not compare with the plan
SCOUTED = 24  # candidates from which on a shorter look drops those that win nowhere
LOOKERS = 2  # units of work a first look is dealt out to, each with a generation of its own
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
    blend: tuple[float, float]
    blends: dict[str, float]
    verdict: Verdict
    singles: list[tuple[int, Score]]
    plan: Plan


def work_folder(pipe: Any, parent: Path | None, backend: str) -> Path | None:
    """Return the folder of results that hold for this pipeline, backend and these versions."""
    if parent is None:
        return None
    scheduler = getattr(pipe, "scheduler", None)
    kinds = [type(pipe).__name__, type(scheduler).__name__]
    parts = [weights_digest(t.denoiser) for t in find_targets(pipe)]
    others = getattr(pipe, "components", {})
    parts += [weights_digest(m) for m in others.values() if isinstance(m, torch.nn.Module)]
    mark = fingerprint(versions(), kinds, parts, dict(getattr(scheduler, "config", {})), backend)
    folder = parent / mark
    with disk_errors(f"cannot write to {parent}", "another folder"):
        folder.mkdir(parents=True, exist_ok=True)
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
    groups = ends_of([c.method for c in candidates if is_chooser(c)], facts.model.heads)

    def make() -> Result:
        table = measure_costs(
            facts.grid,
            facts.model.heads,
            facts.model.head_dim,
            backend=backend,
            device=device,
            dtype=facts.dtype,
            blocks=tuple(blocks),
            groups=groups,
        )
        table = replace(table, attention_share=facts.attention_share, seconds=facts.seconds)
        return {
            "json": torch.frombuffer(
                bytearray(json.dumps(table.to_dict()).encode()), dtype=torch.uint8
            )
        }

    key = f"cost {facts.grid} {facts.model.heads} {facts.model.head_dim} {facts.dtype} {blocks}"
    key += " " + " ".join(f"{phrase(method)} x {heads}" for method, heads in groups)
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
    first = _first_solver(bench, request, facts, candidates)
    table = first.table
    start = _start(first, request)
    sensitivity = _sensitivity(bench, first, request, facts, start)
    solver, predictor, blend, tried = best_blend(bench, first, sensitivity, request, start)
    watch("curve", curve_points(solver, predictor))
    watch("singles", single_points(solver, predictor, {}))
    verdict = _verify(bench, solver, predictor, request, start, watch)
    singles = _singles(bench, solver, verdict.chosen.solution, request)
    if request.target == "speedup":
        verdict = or_single(verdict, singles, solver, predictor, request.value)
    plan = _signed(verdict, request, solver, facts)
    return Outcome(
        request, facts, table, solver, predictor, sensitivity, blend, tried, verdict, singles, plan
    )


def looks_first(request: Request, candidates: list[Candidate]) -> bool:
    """Whether there are so many candidates that a shorter look drops some before the long one."""
    return len(candidates) > SCOUTED and request.carry is None


def _first_solver(
    bench: Bench, request: Request, facts: Facts, candidates: list[Candidate]
) -> Solver:
    """Return the solver of a calibrated table whose relative errors count alike in every layer."""
    budget, by_time = request.budget, request.target == "speedup"
    sites = sites_for(
        facts, request.ranges, budget.rows, budget.steps_per_range, request.settings.seed
    )
    device = torch.device(getattr(bench.pipe, "device", "cpu"))

    def timed(some: list[Candidate]) -> CostTable:
        return cost_table(bench.store, facts, some, bench.backend, device)

    def solver_of(table: Table, costs: CostTable) -> Solver:
        weight = flat_weights(table)
        return Solver(table, weight, costs, request.constraints, facts.model, by_time)

    if by_time:  # times decide what survives the first look; elsewhere only survivors are timed
        costs = timed(candidates)

        def prices(table: Table) -> torch.Tensor:
            return solver_of(table, costs).prices()

        return solver_of(calibrated(bench, request, facts, candidates, sites, prices), costs)
    table = calibrated(bench, request, facts, candidates, sites)
    return solver_of(table, timed([candidates[n] for n in table.active.nonzero().flatten()]))


def calibrated(
    bench: Bench,
    request: Request,
    facts: Facts,
    candidates: list[Candidate],
    sites: Sites,
    prices: Callable[[Table], torch.Tensor] = Table.executed,
) -> Table:
    """Return the table of errors: a short look at all candidates, a longer one at the best for
    what they cost.
    """
    scouted, active = None, None
    if looks_first(request, candidates):
        rows = max(1, request.budget.rows // 2)
        brief = sites_for(facts, request.ranges, rows, 1, request.settings.seed)
        brief = replace(brief, passed=frozenset({"uncond"}))  # which looks at the same clip
        first = bench.calibrate(
            request.calibration[:1], brief, candidates, facts, None, parts=LOOKERS
        )
        scouted = merge(first, candidates, brief)
        active = survivors(scouted, prices(scouted))
    results = bench.calibrate(request.calibration, sites, candidates, facts, request.carry, active)
    return merge(results, candidates, sites, scouted, active)


def _sensitivity(
    bench: Bench, first: Solver, request: Request, facts: Facts, start: float
) -> Sensitivity:
    """Return weights, measured the way the request asks for."""
    budget = request.budget
    if request.sensitivity == "gradient":
        sites = first.table.sites
        found = bench.carry_back(request.calibration, sites, budget.vectors)
        total = {name: torch.stack([r[name] for r in found]).sum(dim=0) for name in found[0]}
        weight, both = gradient_weights(total, sites, facts)
        return Sensitivity(weight, tuple(range(facts.model.layers)), both)
    layers = sampled_layers(
        facts.model.layers, budget.sensitivity, request.constraints.dense_layers
    )
    choice = first.solve(start).choice
    return measure_sensitivity(
        bench, first.table, choice, facts.model, request.calibration[:1], layers
    )


def _start(solver: Solver, request: Request) -> float:
    """Return the budget the target asks for; for a PSNR the one the weights are compared at.

    Raises:
        InputError: no plan within the constraints is that sparse or that fast.
    """
    if request.target == "psnr":
        least = solver.reachable(_REFERENCE_DENSITY)
        return min(least * 1.02, 1.0) if least > _REFERENCE_DENSITY else least
    share = solver.costs.attention_share
    if request.target == "density":
        start, words = request.value, "a density of at least {:.3f}"
    else:
        start = 1 - (1 - 1 / request.value) / share if share > 0 else -1.0
        words = "a speed-up of at most {:.2f}"
    start = max(start, 0.0)
    least = solver.reachable(start)
    if least > start:
        reach = least if request.target == "density" else 1 / (1 - share * (1 - least))
        raise InputError(
            f"the target {request.target} is out of reach",
            expected=words.format(reach) + " with these methods and constraints",
            got=f"{request.value:g}",
            remedy="more methods, fewer pinned layers or heads, or a looser target",
        )
    return start


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
        return verifier.within(Goal.density(start))
    return verifier.within(Goal.speedup(request.value, start, solver.costs.attention_share))


def _singles(
    bench: Bench, solver: Solver, plan: Solution, request: Request
) -> list[tuple[int, Score]]:
    """Return scores of single methods that cost about as much as a plan on the held-out prompts:
    that work through as many pairs, or take as much time where the target is a speed-up.

    One of each method comes first, those predicted to do best before the others.
    """

    def price(solution: Solution) -> float:
        return solution.cost if solver.by_time else solution.executed

    usable = [
        number
        for number, c in enumerate(solver.table.candidates)
        if number and getattr(c.method, "mode", "") != "skip"
    ]
    alone = {n: solver.single(n) for n in usable}
    apart = {n: abs(price(solution) - price(plan)) for n, solution in alone.items()}
    loss = {n: solution.loss for n, solution in alone.items()}
    near = sorted(usable, key=lambda n: (max(apart[n] - NEAR, 0.0), loss[n], n))
    best: dict[str, int] = {}
    for number in near:
        best.setdefault(solver.table.candidates[number].method.name, number)
    chosen = [*best.values(), *(n for n in near if n not in best.values())]
    chosen = chosen[: request.budget.points]
    plans = [solver.single(number).plan for number in chosen]
    what = "generating with single methods"
    scores = bench.score_all(what, plans, request.held_out, solver.by_time)
    return list(zip(chosen, scores, strict=True))


def or_single(
    verdict: Verdict,
    singles: list[tuple[int, Score]],
    solver: Solver,
    predictor: Predictor,
    target: float,
) -> Verdict:
    """Return the verdict on a single method where one as fast as asked for came out better.

    Not under constraints, which a method on all layers and heads does not keep to.
    """
    fast = [pair for pair in singles if pair[1].speedup >= target]
    if not fast or solver.constraints != Constraints():
        return verdict
    number, score = max(fast, key=lambda pair: pair[1].mean_psnr_db)
    if verdict.met and score.mean_psnr_db <= verdict.chosen.score.mean_psnr_db:
        return verdict
    alone = solver.single(number)
    solution = replace(alone, plan=replace(alone.plan, model=solver.model))
    trial = Trial(alone.cost, solution, predictor.psnr_db(alone.loss), score)
    remark = (
        f"{score.speedup:.2f} times as fast as dense by one method alone, "
        f"better than {len(verdict.trials)} plan(s)"
    )
    return Verdict(trial, [*verdict.trials, trial], True, remark)


def _signed(verdict: Verdict, request: Request, solver: Solver, facts: Facts) -> Plan:
    """Return the plan with where it comes from and what was measured; no dates, and no times but
    the speed-up that was asked for.
    """
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
        "cost_basis": solver.costs.basis,
    }
    used = [
        c for c in solver.table.candidates if any(c.method == r.method for r in solution.plan.rules)
    ]
    measured = {
        "densities": {
            c.name: [round(c.density, 4), round(c.computed, 4)] for c in used if is_chooser(c)
        },
        "density": round(chosen.score.density, 6),
        "predicted_density": round(solution.density, 6),
        "executed": round(chosen.executed, 6),
        "predicted_psnr_db": round(chosen.predicted_db, 4),
        "held_out": chosen.score.to_dict(),
    }
    return replace(solution.plan, provenance=provenance, measured=measured)


def plain_costs(facts: Facts) -> CostTable:
    """Return the FLOPs fallback for a model at one size."""
    return flops_table(facts.grid, facts.model.heads, facts.model.head_dim)
