"""Points of the speed-quality frontier as JSON types: what a plot shows, also before the end."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dittools.searching.measure import Score
from dittools.searching.solver import Predictor, Solver
from dittools.searching.verify import Trial

Watch = Callable[[str, Any], None]  # (name, JSON value): "curve", "singles" or "trial"
DENSITIES = tuple(i / 20 for i in range(2, 20))


def curve_points(solver: Solver, predictor: Predictor) -> list[dict[str, float]]:
    """Return what searched plans are predicted to do, along the density axis.

    The solver may count time; the axis is density all the same.
    """
    found = replace(solver, by_time=False).frontier(DENSITIES)
    return [
        {
            "density": round(s.density, 6),
            "executed": round(s.executed, 6),
            "psnr_db": round(predictor.psnr_db(s.loss), 4),
        }
        for s in found
    ]


def single_points(
    solver: Solver, predictor: Predictor, measured: Mapping[int, Score]
) -> list[dict[str, Any]]:
    """Return every candidate on all layers, heads and steps; those measured with their score."""
    points = []
    for number, candidate in enumerate(solver.table.candidates):
        if number == 0:
            continue
        score = measured.get(number)
        points.append(
            {
                "method": candidate.method.name,
                "name": candidate.name,
                "density": round(candidate.density, 6),
                "computed": round(candidate.computed, 6),
                "predicted_db": round(predictor.psnr_db(solver.single(number).loss), 4),
                "held_out": None if score is None else score.to_dict(),
            }
        )
    return points


def trial_point(trial: Trial) -> dict[str, Any]:
    """Return one verified plan."""
    return {
        "budget": round(trial.budget, 6),
        "predicted_density": round(trial.solution.density, 6),
        "predicted_db": round(trial.predicted_db, 4),
        "executed": round(trial.executed, 6),
        **trial.score.to_dict(),
    }
