"""What a search found, as JSON types: the content of frontier.json, report and atlas."""

from typing import Any

import torch

from dittools.methods import to_params
from dittools.searching.atlas import BANDS, band_shares, head_class
from dittools.searching.points import curve_points, single_points, trial_point
from dittools.searching.run import Outcome, versions
from dittools.searching.table import Table

FORMAT = "dittools-frontier"


def frontier_of(outcome: Outcome) -> dict[str, Any]:
    """Return the frontier: predicted curve, verified plans, every single method."""
    table, solver = outcome.table, outcome.solver
    singles = single_points(solver, outcome.predictor, dict(outcome.singles))
    return {
        "format": FORMAT,
        "version": 1,
        "versions": versions(),
        "target": {outcome.request.target: outcome.request.value},
        "met": outcome.verdict.met,
        "remark": outcome.verdict.remark,
        "model": _model(outcome),
        "settings": outcome.request.settings.to_dict(),
        "calibration": [s.prompt for s in outcome.request.calibration],
        "held_out": [s.prompt for s in outcome.request.held_out],
        "chosen": trial_point(outcome.verdict.chosen),
        "trials": [trial_point(trial) for trial in outcome.verdict.trials],
        "predicted": curve_points(solver, outcome.predictor),
        "singles": singles,
        "weights": {
            "blend": list(outcome.blend),
            "kind": outcome.request.sensitivity,
            "branches": list(table.branches),
            "calibration_psnr_db": {name: _db(v) for name, v in outcome.blends.items()},
            "sensitivity": _rounded(outcome.sensitivity.weight.mean(dim=2)),
            "layers_perturbed": list(outcome.sensitivity.measured),
        },
        "probe": {
            "rows": len(table.sites.rows),
            "steps": sorted(table.sites.sampled),
            "ranges": list(table.sites.ranges),
        },
    }


def _model(outcome: Outcome) -> dict[str, Any]:
    facts = outcome.facts
    return {
        "class": facts.model.class_name,
        "layers": facts.model.layers,
        "heads": facts.model.heads,
        "head_dim": facts.model.head_dim,
        "grid": list(facts.grid.shape),
        "text": facts.grid.text,
        "steps": facts.steps,
    }


def atlas_of(table: Table, choice: torch.Tensor) -> dict[str, Any]:
    """Return the head atlas: per layer, step range and head its map, bands, class and errors.

    A cell whose branches run different candidates has `choices` of cond and uncond; its `choice` is
    that of cond.

    Args:
        table: what the probe measured; parts are step ranges.
        choice: int64 [L * R * H], or [L * R * 2 * H] of the branches, candidate per item.
    """
    layers, ranges, heads = table.shape
    uniform = band_shares(table.sites.grid, table.sites.rows).tolist()
    chosen = choice.view(layers, ranges, -1, heads)
    picked = chosen[:, :, 0]
    relative = table.error / table.norm.clamp(min=1e-30)[..., None]
    cells = []
    for layer in range(layers):
        for part in range(ranges):
            for head in range(heads):
                mass = table.bands[layer, part, head].tolist()
                cells.append(
                    {
                        "layer": layer,
                        "range": part,
                        "head": head,
                        "class": head_class(mass, uniform),
                        "bands": [round(m, 4) for m in mass],
                        "choice": int(picked[layer, part, head]),
                        **_choices(chosen[layer, part, :, head].tolist()),
                        "error": _errors(relative[layer, part, head]),
                        "branches": _branches(table, layer, part, head),
                        "map": _bytes(table.maps[layer, part, head]),
                    }
                )
    return {
        "layers": layers,
        "heads": heads,
        "ranges": list(table.sites.ranges),
        "range_steps": table.sites.range_steps,
        "bands": list(BANDS),
        "uniform": [round(u, 4) for u in uniform],
        "candidates": [
            {
                "name": c.name,
                "method": c.method.name,
                "params": plain(c.method),
                "density": round(c.density, 4),
            }
            for c in table.candidates
        ],
        "cells": cells,
    }


def _choices(of_branches: list[int]) -> dict[str, list[int]]:
    return {"choices": of_branches} if len(set(of_branches)) > 1 else {}


def plain(method: Any) -> dict[str, Any] | None:
    """Return a method's parameters as JSON types; None where one is a tensor."""
    params = to_params(method)
    return None if any(isinstance(v, torch.Tensor) for v in params.values()) else params


def _branches(table: Table, layer: int, part: int, head: int) -> list[list[float | None]]:
    """Return relative errors per CFG branch that was seen."""
    norm = table.norm[layer, part, head].clamp(min=1e-30)
    found = table.by_branch[layer, part, :, head] / norm
    return [_errors(row) for row in found if bool((row != 0).any())]


def _errors(row: torch.Tensor) -> list[float | None]:
    """Return relative root errors; None where a candidate cannot run."""
    return [round(float(v) ** 0.5, 5) if bool(v.isfinite()) else None for v in row.clamp(min=0)]


def _bytes(tensor: torch.Tensor) -> list[int]:
    """Return a map as levels 0..255, the brightest cell 255; the square root shows faint mass."""
    level = (tensor / tensor.max().clamp(min=1e-30)).sqrt() * 255
    return [int(v) for v in level.round().flatten().tolist()]


def _db(value: float) -> float:
    return round(value, 4)


def _rounded(tensor: torch.Tensor) -> list[list[float]]:
    return [[float(f"{v:.6g}") for v in row] for row in tensor.tolist()]
