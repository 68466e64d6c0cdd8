"""Every method on the embedded model at matched densities, between a floor and a ceiling.

    python bench/scoreboard.py --density 0.4 --prompts 16 --minutes 12

Densities count the whole run. No method gets dense steps; `--warm-up` adds a second row for each
behind a sixth of dense steps, with what is left of the density. Generations are kept, each with the
git revision it was measured at: a run that was stopped goes on, and methods whose code changed
since are measured again. Written are scoreboard.md, scoreboard.png and results/scoreboard.json in
the folder of `--out`. Times are CPU seconds of one thread. `--merge` takes over rows of other runs,
made elsewhere or at other revisions.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from board_page import page, plot
from board_rows import DEMO_GRID, NEAR, NUMBERS, Judge, Missing, Row, all_methods, method_row

from dittools.methods import to_params
from dittools.pipelines import load
from dittools.pipelines.demo import DEMO_DEFAULTS
from dittools.pipelines.demo.score import held_out_pairs
from dittools.pipelines.generate import Settings
from dittools.pipelines.output import write_text
from dittools.plans import Plan
from dittools.searching.run import work_folder
from dittools.searching.store import Store, read_prompts

WARM_UP = 1 / 6  # of the steps
CALIBRATION = Path(__file__).parent / "search_prompts.txt"
OTHER_SEED = 7919
OTHER_SIZES = ("freeswim",)  # made for sizes beyond the training size, not for saving pairs


def settings_of(count: int) -> list[Settings]:
    """Return held-out generations: looks and motions the model was never trained on."""
    chosen = held_out_pairs()[:: max(1, 64 // count)][:count]
    return [_settings(pair.prompt, pair.seed) for pair in chosen]


def calibration_settings() -> list[Settings]:
    """Return the generations that variants and densities are chosen on; none is on the board."""
    return [_settings(prompt, i) for i, prompt in enumerate(read_prompts(CALIBRATION)[0:4:2])]


def _settings(prompt: str, seed: int) -> Settings:
    sizes = {name: DEMO_DEFAULTS[name] for name in ("height", "width", "frames", "steps")}
    return Settings(prompt, seed=seed, guidance=DEMO_DEFAULTS["guidance"], **sizes)


def rows_of(
    judge: Judge,
    density: float,
    methods: list[str],
    plans: list[Path],
    warm_up: bool,
    labels: dict[str, str],
) -> list[Row]:
    """Return the rows of one density; those that may not be made now are left out."""
    rows = [
        Row("dense", "reference", Plan(), density),
        Row("dense, another seed", "floor", Plan(), density, seed_shift=OTHER_SEED),
    ]
    loaded = [(path, Plan.load(path)) for path in plans]
    near = [(p, x) for p, x in loaded if abs(x.measured.get("density", density) - density) <= NEAR]
    for path, plan in near:
        name = "searched plan" if path.stem == "plan" else f"searched plan, {path.stem}"
        rows.append(Row(name, "searched", plan, density, path.stem))
    for name in methods:
        for warm in (0.0, WARM_UP) if warm_up and name not in ("random", "oracle") else (0.0,):
            if density - warm > 0.02:
                try:
                    row = method_row(
                        judge, name, density, calibration_settings(), warm, labels.get(name)
                    )
                except Missing:
                    continue
                if row is not None:
                    after = f" after {warm:.0%} dense steps" if warm else ""
                    rows.append(Row(row.name + after, *list(vars(row).values())[1:]))
    return rows


def measure(judge: Judge, rows: list[Row], settings: list[Settings]) -> list[dict[str, Any]]:
    """Return the lines of one density, prompt by prompt for all rows, as far as time allows."""
    found: list[list[dict[str, Any]]] = [[] for _ in rows]
    for use in settings:
        for row, numbers in zip(rows, found, strict=True):
            try:
                numbers.append(judge.numbers(row.plan, use, row.seed_shift))
            except Missing:
                continue
    return [_line(row, some) for row, some in zip(rows, found, strict=True) if some]


def _line(row: Row, found: list[dict[str, Any]]) -> dict[str, Any]:
    mean = {name: sum(f[name] for f in found) / len(found) for name in NUMBERS}
    method = row.plan.rules[0].method if row.kind in ("method", "ceiling") else None
    params = {} if method is None else to_params(method)
    return {
        "name": row.name,
        "kind": row.kind,
        "detail": row.detail,
        "params": params,
        "prompts": len(found),
        **{name: round(value, 4) for name, value in mean.items()},
        "psnr_db_each": [round(f["psnr_db"], 2) for f in found],
        "revisions": sorted({f["revision"] for f in found}),
    }


def add_gap(lines: list[dict[str, Any]]) -> None:
    """Add to every row which share of the gap from random blocks to the ceiling it closes."""
    ends = {line["name"]: line["psnr_db"] for line in lines if line["name"] in ("random", "oracle")}
    if len(ends) == 2 and ends["oracle"] > ends["random"]:
        for line in lines:
            if line["kind"] != "reference":
                share = (line["psnr_db"] - ends["random"]) / (ends["oracle"] - ends["random"])
                line["gap_closed"] = round(share, 3)


def merge(content: dict[str, Any], others: list[Path]) -> None:
    """Take over the lines of other runs' scoreboard.json where this run has none of that name."""
    for path in others:
        for density, lines in json.loads(path.read_text())["densities"].items():
            mine = content["densities"].setdefault(density, [])
            names = {line["name"] for line in mine}
            mine += [line for line in lines if line["name"] not in names]
    for lines in content["densities"].values():
        for line in lines:
            line.pop("gap_closed", None)
        add_gap(lines)


def variants_of(path: Path | None) -> dict[str, str]:
    """Return the variant each method ran in another run, at the density with most prompts."""
    if path is None:
        return {}
    found = json.loads(path.read_text())["densities"].values()
    best = max(found, key=lambda lines: max(line["prompts"] for line in lines))
    return {line["name"]: line["detail"] for line in best if line["kind"] != "searched"}


def write(content: dict[str, Any], out: Path) -> None:
    """Write table, plot and numbers."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    write_text(out / "results" / "scoreboard.json", json.dumps(content, indent=1) + "\n")
    write_text(out / "scoreboard.md", page(content))
    plot(content, out / "scoreboard.png")


def main() -> None:
    """Run the board."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--density", type=float, action="append", help="default .4 .3 .2 .5")
    parser.add_argument("--method", action="append", help="default: all of METHODS")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=600, help="stop after this long")
    parser.add_argument("--plan", type=Path, action="append", default=[], help="searched plan file")
    parser.add_argument("--warm-up", action="store_true", help="rows behind dense steps too")
    parser.add_argument("--merge", type=Path, action="append", default=[], help="other runs' json")
    parser.add_argument("--variants", type=Path, help="another run's json: try no other variants")
    parser.add_argument("--only-write", action="store_true", help="write what is measured already")
    parser.add_argument("--out", type=Path, default=Path("out/scoreboard"))
    parser.add_argument("--work", type=Path, default=Path("out/scoreboard"))
    given = parser.parse_args()
    torch.set_num_threads(1)  # CPU seconds of one thread are what is reported
    deadline = time.monotonic() + (0 if given.only_write else given.minutes * 60)
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    store = Store(work_folder(pipe, given.work, "cpu"))
    judge = Judge(pipe, store, lambda: time.monotonic() < deadline)
    settings = settings_of(given.prompts)
    content: dict[str, Any] = {
        "grid": list(DEMO_GRID.shape),
        "steps": settings[0].steps,
        "methods": [name for name in all_methods() if name not in OTHER_SIZES],
        "prompts": [{"prompt": s.prompt, "seed": s.seed} for s in settings],
        "densities": {},
    }
    for density in given.density or [0.4, 0.3, 0.2, 0.5]:
        methods = given.method or all_methods()
        labels = variants_of(given.variants)
        rows = rows_of(judge, density, methods, given.plan, given.warm_up, labels)
        lines = measure(judge, rows, settings)
        add_gap(lines)
        if lines:
            content["densities"][f"{density:g}"] = lines
            print(page({**content, "densities": {f"{density:g}": lines}}, short=True), flush=True)
    merge(content, given.merge)
    write(content, given.out)


if __name__ == "__main__":
    main()
