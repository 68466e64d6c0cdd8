"""Turning the counts of a runtime into a report."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from dittools.grid import TokenGrid
from dittools.patches.install import not_interceptable
from dittools.patches.report import LayerReport, Report
from dittools.patches.root import Root
from dittools.patches.runtime import Runtime, Tally
from dittools.patches.sites import Site
from dittools.plans import Plan

Squares = Mapping[tuple[str, int], tuple[float, int]]  # (site, step): squared errors, their count


def summarise(
    runtime: Runtime,
    roots: list[Root],
    denoisers: list[torch.nn.Module],
    family: str,
    source: str,
    notes: list[str],
) -> Report:
    """Return the report of an attachment; see `Report` for what its numbers mean."""
    flight = runtime.flight
    if flight is not None:
        flight.look()
    squares = {} if flight is None else flight.errors
    by_site = _by_site(squares)
    layers = [
        _layer(site, runtime.tally(site), runtime.forwards[root.component], by_site.get(site.name))
        for root in roots
        for site in root.sites
    ]
    calls = {
        name: sum(getattr(layer, name) for layer in layers)
        for name in ("sparse", "dense", "passed_through")
    }
    sparse_sum = sum(layer.sparse * layer.sparse_density for layer in layers)
    eligible = calls["sparse"] + calls["dense"]
    fallbacks, fallback_sites = _fallbacks(runtime, roots)
    schedule = runtime.plan.schedule
    looking = 0.0 if flight is None else flight.watch.total_ms
    return Report(
        method=_methods(runtime.plan),
        preset=source,
        family=family,
        schedule={
            "dense_first_steps": schedule.dense_first_steps,
            "dense_last_steps": schedule.dense_last_steps,
            "dense_layers": schedule.dense_layers,
        },
        density=(sparse_sum + calls["dense"]) / eligible if eligible else 1.0,
        sparse_density=sparse_sum / calls["sparse"] if calls["sparse"] else 1.0,
        calls=calls,
        attention_ms=runtime.attention.total_ms,
        choosing_ms=max(runtime.sparse_calls.total_ms - runtime.backend_work.total_ms - looking, 0),
        fallbacks=fallbacks,
        fallback_sites=fallback_sites,
        coverage=_coverage(runtime, roots, denoisers),
        backends=sorted(runtime.used),
        branches=sorted(runtime.branches),
        steps=len(runtime.steps_seen),
        forwards=runtime.forwards.total(),
        grids=sorted(_words(grid) for grid in runtime.grids),
        notes=notes,
        skipped=sum(layer.skipped for layer in layers),
        layers=layers,
        error=_rms(squares.values()),
        errors=_errors(squares),
        incidents=[] if flight is None else list(flight.incidents),
        incidents_left_out=0 if flight is None else flight.left_out,
        recorder_ms=looking,
    )


def _rms(found: Iterable[tuple[float, int]]) -> float | None:
    """Return the root of a mean of squares that come as (sum, count); None without any."""
    pairs = list(found)
    calls = sum(count for _, count in pairs)
    return math.sqrt(sum(total for total, _ in pairs) / calls) if calls else None


def _by_site(squares: Squares) -> dict[str, float | None]:
    by_site: dict[str, list[tuple[float, int]]] = {}
    for (site, _), pair in squares.items():
        by_site.setdefault(site, []).append(pair)
    return {site: _rms(pairs) for site, pairs in by_site.items()}


def _errors(squares: Squares) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for (site, step), (total, count) in sorted(squares.items()):
        found.setdefault(site, {})[step] = math.sqrt(total / count)
    return found


def _layer(site: Site, tally: Tally, forwards: int, error: float | None) -> LayerReport:
    eligible = tally.sparse + tally.dense
    total = float(tally.sparse_density)
    return LayerReport(
        site=site.name,
        layer=site.layer,
        sparse=tally.sparse,
        dense=tally.dense,
        passed_through=tally.passed,
        density=(total + tally.dense) / eligible if eligible else 1.0,
        sparse_density=total / tally.sparse if tally.sparse else 1.0,
        # a site that was never called is reported by `coverage`, with the reason
        skipped=forwards - tally.forwards if tally.forwards else 0,
        error=error,
    )


def _methods(plan: Plan) -> str:
    return ", ".join(dict.fromkeys(rule.method.name for rule in plan.rules)) or "dense"


def _fallbacks(runtime: Runtime, roots: list[Root]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return reasons with counts, most frequent first, and the sites of each."""
    counts: Counter[str] = Counter()
    sites: dict[str, list[str]] = {}
    for root in roots:
        for site in root.sites:
            for reason, count in runtime.tally(site).fallbacks.items():
                counts[reason] += count
                sites.setdefault(reason, []).append(site.name)
    ordered = dict(counts.most_common())
    return ordered, {reason: sites[reason] for reason in ordered}


def _coverage(
    runtime: Runtime, roots: list[Root], denoisers: list[torch.nn.Module]
) -> dict[str, object]:
    """Say which selected sites no call came through, and why where that can be told."""
    never: dict[str, str] = {}
    fired = selected = 0
    for root in roots:
        for site in root.sites:
            selected += 1
            tally = runtime.tally(site)
            if tally.sparse + tally.dense + tally.passed:
                fired += 1
            elif root.moment is not None:
                never[site.name] = _why(site.path, denoisers)
    return {"selected": selected, "fired": fired, "never_fired": never}


def _why(path: str, denoisers: list[torch.nn.Module]) -> str:
    for denoiser in denoisers:
        try:
            module = denoiser.get_submodule(path)
        except AttributeError:  # a path of the other denoiser
            continue
        return not_interceptable(module) or f"{type(module.processor).__name__} made no call"
    return "the model is gone"


def _words(grid: TokenGrid) -> str:
    text = f" + {grid.text} text" if grid.text else ""
    return f"{grid.frames}x{grid.height}x{grid.width}{text}"
