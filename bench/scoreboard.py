"""Every method on the embedded model at matched densities, between a floor and a ceiling.

    python bench/scoreboard.py --density 0.4 --prompts 16 --minutes 12

Densities count the whole run, dense steps included. Every method runs twice: on all steps, and
behind a sixth of dense steps with what is left of the density. The floor keeps random blocks, the
ceiling the blocks that truly hold most attention mass, found by looking. Finished generations are
kept, so that a run that was stopped or ran out of time goes on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittools.grid import TokenGrid
from dittools.methods import build
from dittools.patches import attach
from dittools.pipelines import load
from dittools.pipelines.demo import DEMO_DEFAULTS
from dittools.pipelines.demo.score import held_out_pairs
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.output import write_text
from dittools.plans import Plan
from dittools.searching.candidates import Candidate, candidates_for
from dittools.searching.forecast import forecast
from dittools.searching.measure import Bench, Score
from dittools.searching.run import work_folder
from dittools.searching.store import Store

WARM_UP = 1 / 6  # of the steps
NEAR = 0.04  # a method counts as matched when its density is this close


@dataclass(frozen=True)
class Case:
    """One row of the board: a name, what it is, and the plan."""

    name: str
    kind: str
    plan: Plan


def cases(
    grid: TokenGrid, density: float, searched: dict[str, Plan], frontier: dict[str, Any] | None
) -> list[Case]:
    """Return the rows of one density: floor, ceiling, searched plans, every method."""
    random = build("random", {"density": density, "block_size": 32})
    oracle = build("oracle", {"density": density, "block_size": 32})
    found = [
        Case("random blocks", "floor", Plan.of(random)),
        Case("oracle top-k", "ceiling", Plan.of(oracle)),
        *(Case(name, "searched", plan) for name, plan in searched.items()),
    ]
    rest = (density - WARM_UP) / (1 - WARM_UP)
    for share, warm in ((density, 0.0), (rest, WARM_UP)):
        if share <= 0.02:
            continue
        for candidate in best_variants(candidates_for(grid), share, frontier):
            name = candidate.name + (f" after {warm:.0%} dense steps" if warm else "")
            found.append(Case(name, "method", Plan.of(candidate.method, dense_first_steps=warm)))
    return found


def best_variants(
    candidates: Iterable[Candidate], density: float, frontier: dict[str, Any] | None
) -> list[Candidate]:
    """Return one variant per method: of those near the density the one predicted to do best."""
    predicted = {s["name"]: s for s in (frontier or {}).get("singles", [])}
    best: dict[str, tuple[tuple[float, float], Candidate]] = {}
    for candidate in candidates:
        if candidate.method.name == "dense" or getattr(candidate.method, "mode", "") == "skip":
            continue
        known = predicted.get(candidate.name)
        share = (
            candidate.density if candidate.mask is not None or known is None else known["density"]
        )
        if candidate.mask is None and known is None:
            share = getattr(candidate.method, "density", density)
        far = max(abs(share - density) - NEAR, 0.0)
        rank = (far, -known["predicted_db"] if known else abs(share - density))
        name = candidate.method.name
        if name not in best or rank < best[name][0]:
            best[name] = (rank, candidate)
    return [candidate for _, candidate in best.values()]


def settings_of(count: int, first: int = 0) -> list[Settings]:
    """Return held-out generations: looks and motions the model was never trained on."""
    chosen = held_out_pairs()[first :: max(1, 64 // count)][:count]
    sizes = {name: DEMO_DEFAULTS[name] for name in ("height", "width", "frames", "steps")}
    guidance = DEMO_DEFAULTS["guidance"]
    return [Settings(p.prompt, seed=p.seed, guidance=guidance, **sizes) for p in chosen]


def board(
    bench: Bench, rows: list[Case], settings: list[Settings], deadline: float
) -> list[dict[str, Any]]:
    """Return the scores of as many rows as the time allows, prompt by prompt for all of them."""
    scores: dict[str, list[Score]] = {row.name: [] for row in rows}
    for use in settings:
        for row in rows:
            if time.monotonic() > deadline:
                break
            scores[row.name].append(bench.score(row.name, row.plan, [use]))
    complete = min(len(s) for s in scores.values())
    lines = []
    for row in rows:
        some = scores[row.name][: complete or None]
        if some:
            psnr = statistics.mean(s.psnr_db[0] for s in some)
            lines.append(
                {
                    "name": row.name,
                    "kind": row.kind,
                    "prompts": len(some),
                    "density": round(statistics.mean(s.density for s in some), 4),
                    "psnr_db": round(psnr, 3),
                    "ssim": round(statistics.mean(s.ssim[0] for s in some), 4),
                }
            )
    return lines


def add_gap(lines: list[dict[str, Any]]) -> None:
    """Add to every row which share of the gap from floor to ceiling it closes."""
    ends = {line["kind"]: line["psnr_db"] for line in lines if line["kind"] in ("floor", "ceiling")}
    if len(ends) == 2 and ends["ceiling"] > ends["floor"]:
        for line in lines:
            share = (line["psnr_db"] - ends["floor"]) / (ends["ceiling"] - ends["floor"])
            line["gap_closed"] = round(share, 3)


def is_matched(line: dict[str, Any], density: float) -> bool:
    """Whether a row ran near enough to the density of the board to be compared."""
    return bool(abs(line["density"] - density) <= NEAR)


def as_table(density: float, lines: list[dict[str, Any]]) -> str:
    """Return one density as a Markdown table, best first, rows of another density last."""
    text = [
        f"### Density {density:g}, {min(line['prompts'] for line in lines)} held-out prompts",
        "",
        "| | density | PSNR dB | SSIM | gap closed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in sorted(lines, key=lambda row: (not is_matched(row, density), -row["psnr_db"])):
        off = "" if is_matched(line, density) else " (not matched)"
        gap = f"{line['gap_closed']:.0%}" if "gap_closed" in line else ""
        text.append(
            f"| {line['name']}{off} | {line['density']:.3f} | {line['psnr_db']:.2f} | "
            f"{line['ssim']:.3f} | {gap} |"
        )
    return "\n".join([*text, ""])


def speed(pipe: Any, plan: Plan, settings: Settings, repeats: int) -> dict[str, float]:
    """Return forecast and measured seconds of a plan: dense and sparse in turn, medians."""
    sizes = {k: getattr(settings, k) for k in ("height", "width", "frames", "steps", "guidance")}
    promised = forecast(pipe, plan, backend="cpu", **sizes)
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(repeats + 1):
        seconds["dense"].append(generate(pipe, settings).seconds)
        with attach(pipe, promised.plan, backend="cpu"):
            seconds["sparse"].append(generate(pipe, settings).seconds)
    dense, sparse = (statistics.median(s[1:]) for s in seconds.values())
    return {
        "forecast_speedup": promised.speedup,
        "measured_speedup": dense / sparse,
        "forecast_seconds": promised.seconds or 0.0,
        "measured_seconds": sparse,
        "attention_share": promised.attention_share,
        "layers_left_dense": float(len(promised.losing)),
    }


def main() -> None:
    """Run the board and write board.json and board.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--density", type=float, action="append", help="default .2 .3 .4 .5")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=600, help="stop after this long")
    parser.add_argument("--plan", type=Path, action="append", default=[], help="searched plan file")
    parser.add_argument("--out", type=Path, default=Path("out/scoreboard"))
    parser.add_argument("--speed", type=int, default=0, help="also time the plans so many times")
    given = parser.parse_args()
    deadline = time.monotonic() + given.minutes * 60
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    store = Store(work_folder(pipe, given.out / ".work", "cpu"))
    bench = Bench(pipe, store, "cpu")
    grid = TokenGrid(12, 12, 12)
    settings = settings_of(given.prompts)
    for plan in given.plan if given.speed else ():
        found = speed(pipe, Plan.load(plan), settings[0], given.speed)
        print(f"{plan}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)
    content: dict[str, Any] = {"prompts": [s.prompt for s in settings], "densities": {}}
    tables = []
    for density in given.density or [0.2, 0.3, 0.4, 0.5]:
        searched = {f"searched plan {p}": Plan.load(p) for p in given.plan}
        searched = {
            name: plan
            for name, plan in searched.items()
            if abs(plan.measured.get("density", density) - density) <= NEAR
        }
        beside = [p.parent / "frontier.json" for p in given.plan]
        known = next((json.loads(p.read_text()) for p in beside if p.exists()), None)
        lines = board(bench, cases(grid, density, searched, known), settings, deadline)
        add_gap(lines)
        content["densities"][f"{density:g}"] = lines
        if lines:
            tables.append(as_table(density, lines))
            print(tables[-1], flush=True)
        write_text(given.out / "board.json", json.dumps(content, indent=1) + "\n")
        write_text(given.out / "board.md", "\n".join(tables))


if __name__ == "__main__":
    main()
