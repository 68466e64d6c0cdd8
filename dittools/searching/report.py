"""report.html of a search: the frontier with every single method on it, scores, and the atlas."""

import html
from typing import Any

from dittools.searching.cost import CostTable
from dittools.searching.page import ATLAS_SCRIPT, atlas_body, document, table

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 320, 48, 36


def page(frontier: dict[str, Any], atlas: dict[str, Any], costs: CostTable) -> str:
    """Return the report as one self-contained HTML page; equal inputs give equal bytes."""
    target = ", ".join(f"{name} {value:g}" for name, value in frontier["target"].items())
    state = "met" if frontier["met"] else "not met"
    body = [
        f"<p>Target {html.escape(target)}: <b>{state}</b>, {html.escape(frontier['remark'])}.</p>",
        _scores(frontier),
        "<h2>Speed and quality</h2>",
        _chart(frontier),
        '<p class="soft">Line: predicted for searched plans. Filled dots: plans generated on the '
        "held-out prompts. Circles: single methods, filled where they were generated, at their "
        "predicted PSNR otherwise.</p>",
        _singles(frontier),
        atlas_body(can_export=False),
        _provenance(frontier, costs),
    ]
    return document("dittools search", "".join(body), atlas, ATLAS_SCRIPT)


def _scores(frontier: dict[str, Any]) -> str:
    chosen = frontier["chosen"]
    rows: list[list[Any]] = [
        ["density", chosen["predicted_density"], chosen["density"]],
        ["PSNR dB", chosen["predicted_db"], chosen["psnr_db"]],
        ["SSIM", "", chosen["ssim"]],
    ]
    calibration = frontier["weights"]["calibration_psnr_db"]
    best = max(calibration.values())
    rows.append(["PSNR dB on the calibration prompts", "", best])
    if "speedup" in chosen:
        rows.append(["speed-up of a whole generation", "", chosen["speedup"]])
    return "<h2>The plan</h2>" + table(["", "predicted", "realised on held-out prompts"], rows)


def _singles(frontier: dict[str, Any]) -> str:
    names = {"psnr_db": "held-out dB"}
    if "speedup" in frontier["target"]:
        names["speedup"] = "speed-up"
    rows = [
        [
            *(single[key] for key in ("name", "density", "computed", "predicted_db")),
            *((single["held_out"] or {}).get(key, "") for key in names),
        ]
        for single in sorted(frontier["singles"], key=lambda s: (s["density"], s["name"]))
    ]
    head = ["single method", "density", "blocks computed", "predicted dB", *names.values()]
    inner = table(head, rows)
    return f"<details><summary>All {len(rows)} single methods</summary>{inner}</details>"


def _chart(frontier: dict[str, Any]) -> str:
    """Draw density to the right, PSNR upwards."""
    line = [(p["density"], p["psnr_db"]) for p in frontier["predicted"]]
    trials = [(t["density"], t["psnr_db"], f"plan at {t['budget']:g}") for t in frontier["trials"]]
    singles = [
        (
            s["density"],
            s["held_out"]["psnr_db"] if s["held_out"] else s["predicted_db"],
            s["name"],
            bool(s["held_out"]),
        )
        for s in frontier["singles"]
    ]
    heights: list[float] = [y for _, y in line] + [t[1] for t in trials] + [s[1] for s in singles]
    low, high = min(heights) - 1, min(max(heights) + 1, 80)

    def x(density: float) -> float:
        return round(_LEFT + density * (_WIDTH - _LEFT - 10), 1)

    def y(psnr: float) -> float:
        share = (min(max(psnr, low), high) - low) / (high - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - 10), 1)

    parts = [_axes(x, y, low, high)]
    path = " ".join(f"{x(d)},{y(p)}" for d, p in line)
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--mark)" stroke-width="2"/>')
    for density, psnr, name, is_measured in singles:
        fill = "var(--alt)" if is_measured else "none"
        parts.append(_dot(x(density), y(psnr), fill, "var(--alt)", f"{name}: {psnr:.2f} dB"))
    for density, psnr, name in trials:
        parts.append(
            _dot(x(density), y(psnr), "var(--mark)", "var(--mark)", f"{name}: {psnr:.2f} dB")
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" '
        f'aria-label="PSNR over density">{"".join(parts)}</svg>'
    )


def _dot(x: float, y: float, fill: str, stroke: str, title: str) -> str:
    inner = f"<title>{html.escape(title)}</title>"
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}" stroke="{stroke}">{inner}</circle>'


def _axes(x: Any, y: Any, low: float, high: float) -> str:
    parts = []
    for tenth in range(0, 11, 2):
        place = x(tenth / 10)
        parts.append(
            f'<text x="{place}" y="{_HEIGHT - 18}" text-anchor="middle">{tenth / 10}</text>'
        )
    step = max(1, round((high - low) / 6))
    for level in range(int(low) + 1, int(high) + 1, step):
        parts.append(f'<text x="{_LEFT - 8}" y="{y(level) + 4}" text-anchor="end">{level}</text>')
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y(level)}" y2="{y(level)}" '
            'stroke="var(--line)"/>'
        )
    parts.append(f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 4}" text-anchor="end">density</text>')
    parts.append('<text x="2" y="12">dB</text>')
    return "".join(parts)


def _provenance(frontier: dict[str, Any], costs: CostTable) -> str:
    model = frontier["model"]
    sizes = "x".join(str(side) for side in model["grid"])
    versions = ", ".join(f"{name} {value}" for name, value in frontier["versions"].items())
    basis = (
        f"measured on {costs.device} with the {costs.backend} backend, dense call "
        f"{costs.dense_ms:.2f} ms"
        if costs.basis == "measured"
        else "FLOPs: time in proportion to the blocks visited"
    )
    layers, steps = frontier["weights"]["blend"]
    tried = frontier["weights"]["calibration_psnr_db"]
    compared = "; ".join(f"{name}: {value:.2f} dB" for name, value in tried.items())
    rows: list[list[Any]] = [
        ["model", f"{model['class']}, {model['layers']} layers, {model['heads']} heads"],
        ["grid", f"{sizes} + {model['text']} text tokens, {model['steps']} steps"],
        ["seed", str(frontier["settings"]["seed"])],
        ["calibration prompts", "; ".join(frontier["calibration"])],
        ["held-out prompts", "; ".join(frontier["held_out"])],
        ["weights", f"{layers:g} of what layers were measured to weigh, {steps:g} of steps"],
        ["plans compared on the calibration prompts", compared],
        ["kernel times", basis],
        ["versions", versions],
    ]
    return "<h2>Where this comes from</h2>" + table(["", ""], rows)
