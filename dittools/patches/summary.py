"""Turning the counts of a runtime into a report."""

from collections import Counter

import torch

from dittools.grid import TokenGrid
from dittools.patches.install import not_interceptable
from dittools.patches.report import LayerReport, Report
from dittools.patches.root import Root
from dittools.patches.runtime import Runtime, Tally
from dittools.plans import Plan


def summarise(
    runtime: Runtime,
    roots: list[Root],
    denoisers: list[torch.nn.Module],
    family: str,
    source: str,
    notes: list[str],
) -> Report:
    """Return the report of an attachment; see `Report` for what its numbers mean."""
    layers = [
        _layer(site.name, site.layer, runtime.tally(site), runtime.forwards[root.component])
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
        choosing_ms=max(runtime.sparse_calls.total_ms - runtime.backend_work.total_ms, 0.0),
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
    )


def _layer(name: str, layer: int, tally: Tally, forwards: int) -> LayerReport:
    eligible = tally.sparse + tally.dense
    total = float(tally.sparse_density)
    return LayerReport(
        site=name,
        layer=layer,
        sparse=tally.sparse,
        dense=tally.dense,
        passed_through=tally.passed,
        density=(total + tally.dense) / eligible if eligible else 1.0,
        sparse_density=total / tally.sparse if tally.sparse else 1.0,
        # a site that was never called is reported by `coverage`, with the reason
        skipped=forwards - tally.forwards if tally.forwards else 0,
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
