"""Plans compared by what they do when they run: isolated errors do not add up."""

from dataclasses import replace

from dittools.searching.measure import Bench
from dittools.searching.request import Request
from dittools.searching.solver import Predictor, Solver
from dittools.searching.table import Table, flat_weights
from dittools.searching.weigh import Sensitivity

# shares of the measured weights between layers, and between parts of the run, the rest flat
MEASURED = (1.0, 1.0)
# where even the best plan is far from dense: an error that large is soon as harmful as it can be
# wherever it is made, so that weights mislead and flatter ones often do better
FLAT_BLENDS = ((0.5, 0.5), (0.0, 0.0))
FLAT_BELOW_DB = 35.0


def best_blend(
    bench: Bench, first: Solver, sensitivity: Sensitivity, request: Request, start: float
) -> tuple[Solver, Predictor, tuple[float, float], dict[str, float]]:
    """Return the solver whose joint plan does best on the calibration prompts, and its predictor.

    Isolated errors do not add up, so plans are tried with a method per head and with one per layer;
    flatter weights where these are far from dense; then rules per guidance branch, whose errors may
    cancel less. The joint runs also fix the scale of predicted errors.
    """
    flat = flat_weights(first.table)
    names: dict[str, tuple[float, float]] = {}
    solvers: dict[str, Solver] = {}

    def offer(shares: tuple[float, float], table: Table, suffix: str = "") -> None:
        name = "{:g} of layers, {:g} of steps".format(*shares) + suffix
        solver = replace(first, table=table, weight=sensitivity.blended(flat, shares))
        if solver.reachable(start) <= start:
            solvers[name], names[name] = solver, shares

    offer(MEASURED, first.table)
    joint = first.table.joint()
    if (
        joint is not None
    ):  # what a head needs differs from prompt to prompt, what a layer needs less
        offer(MEASURED, joint, ", heads together")
    tried = _compare(bench, solvers, request, start)
    if max(tried.values()) < FLAT_BELOW_DB:
        known = set(solvers)
        for shares in FLAT_BLENDS:
            offer(shares, first.table)
        new = {name: solver for name, solver in solvers.items() if name not in known}
        tried |= _compare(bench, new, request, start)
    best = max(solvers, key=lambda name: tried[name])
    blend = names[best]
    split = solvers[best].table.split() if request.budget.branches else None
    if split is not None:
        weight = sensitivity.blended(flat_weights(split), blend)
        name = f"{best}, branches apart"
        solvers[name] = replace(first, table=split, weight=weight)
        tried |= _compare(bench, {name: solvers[name]}, request, start)
        best = max(solvers, key=lambda name: tried[name])
    predictor = Predictor.fitted(solvers[best].solve(start).loss, tried[best])
    return solvers[best], predictor, blend, tried


def _compare(
    bench: Bench, solvers: dict[str, Solver], request: Request, start: float
) -> dict[str, float]:
    plans = [solver.solve(start).plan for solver in solvers.values()]
    scores = bench.score_all("comparing weights", plans, request.calibration)
    return {name: score.mean_psnr_db for name, score in zip(solvers, scores, strict=True)}
