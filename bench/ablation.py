"""What every part of metered attention does, beside every other method: docs/metered.md.

    python bench/ablation.py --prompts 16 --minutes 60

Three measurements, each kept, so that a run that was stopped goes on: clips of the embedded model
at equal executed cost, with and without dense first steps; the recorded query, key and value of
every head; and what a call of 32 thousand tokens costs beyond the blocks it attends. Rows of other
methods are those of the scoreboard (`--board`), made the same way. Times are CPU seconds of one
thread.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ablation_page import page
from board_rows import DEMO_GRID, Judge, Missing, plan_of
from metered_cost import costs
from recorded_heads import errors_of_heads
from scoreboard import calibration_settings, settings_of, variants_of

from dittools.methods import Method, build, to_params
from dittools.methods.base import block_for
from dittools.pipelines import load
from dittools.pipelines.output import write_text
from dittools.searching.ladders import Ladder, ladders_for
from dittools.searching.run import work_folder
from dittools.searching.store import Store

ROOT = Path(__file__).parents[1]
DENSITIES = (0.2, 0.3)
WARM_UP = 1 / 6  # two of the twelve steps
NEAR = 0.006  # an executed share this close is not refined further
_TRIES = 5
OTHERS = ("paro", "psa", "svg2", "sparge", "rectified", "vmoba", "svg", "random", "oracle")

HALF = block_for(DEMO_GRID) // 2

# name -> what differs from the method as it is
PARTS: dict[str, dict[str, Any]] = {
    "metered": {},
    "without repair": {"mode": "pooled"},
    "without repair and probe rows": {"mode": "pooled", "probes": 0},
    "without pooling": {"mode": "drop"},
    "without pooling and probe rows": {"mode": "drop", "probes": 0},
    "repair from the output alone": {"learn": "output"},
    "repair without rows of earlier calls": {"recall": 0},
    "repair from the output, this call alone": {"learn": "output", "recall": 0},
    "32 probe rows, three earlier calls": {"probes": 32, "recall": 3},
    "blocks by mass, not error": {"score": "mass"},
    "blocks by one query each": {"rows": 1},
    "blocks by the same queries, this step alone": {"carry": 0.0},
    "a first look no longer than later ones": {"first_look": 1},
    "blocks of half as many keys": {"key_block": HALF},
    "with alike keys: half as many a block, by 8 queries, one threshold": {
        "key_block": HALF,
        "keys": "alike",
        "rows": 8,
        "per_head": False,
    },
    "alike keys, a first look no longer than later ones": {
        "key_block": HALF,
        "keys": "alike",
        "rows": 8,
        "per_head": False,
        "first_look": 1,
    },
    "the same without alike keys": {"key_block": HALF, "rows": 8, "per_head": False},
    "one threshold for all heads": {"per_head": False},
    "blocks cut along one axis order": {"order": "fhw"},
    "blocks cut along a Hilbert curve": {"order": "gilbert"},
    "new blocks where the error grew by 1.1": {"refresh": 1.1},
    "blocks of the first step": {"refresh": 1e9},
}


def part_ladder(extra: dict[str, Any]) -> Ladder:
    """Return the variants of metered attention with something changed."""
    block = block_for(DEMO_GRID)

    def make(density: float) -> Method:
        return build("metered", {"density": round(density, 4), "block_size": block, **extra})

    return Ladder("metered", "", make)


def preset_ladder(name: str, extra: dict[str, Any] | None = None) -> Ladder:
    """Return the variants of a published combination, its groups as large as others' blocks."""
    block = block_for(DEMO_GRID)
    sizes = {
        "least_queries": block,
        "least_keys": block // 2,
        "block_size": block,
        "key_block": max(8, block // 4),
    }

    def make(density: float) -> Method:
        base = to_params(build(name, {}))
        if base["mass"]:  # the mass sets the density
            knob = {"mass": round(min(density**0.5, 0.99), 4)}
            knob["least_kept"] = round(min(float(base["least_kept"]), density / 2), 4)
            knob["least_budget"] = round(min(float(base["least_budget"]), density / 2), 4)
        else:
            knob = {"density": round(density, 4)}
        return build(name, {**sizes, **knob, **(extra or {})})

    return Ladder(name, "", make)


COMBINATIONS: dict[str, Ladder] = {
    **{name: preset_ladder(name) for name in ("svg_ear", "sparse_pr", "svoo", "cluster_attention")},
    "svg_ear with gated repair": preset_ladder("svg_ear", {"probes": 32}),
}


def matched(judge: Judge, ladder: Ladder, share: float, warm_up: float) -> Method:
    """Return the method of a ladder whose executed share of pairs is nearest to the one wanted."""
    settings = calibration_settings()[0]
    wanted = warm_up + (1 - warm_up) * share
    tried: list[tuple[float, Method]] = []
    low, high, aim = 0.004, 0.98, share
    for _ in range(_TRIES):
        method = ladder.make(aim)
        found = judge.numbers(plan_of(method, warm_up), settings)["computed"]
        tried.append((abs(found - wanted), method))
        if abs(found - wanted) <= NEAR:
            break
        low, high = (aim, high) if found < wanted else (low, aim)
        step = aim + (wanted - found) / (1 - warm_up)
        aim = step if low < step < high else (low + high) / 2
    return min(tried, key=lambda t: t[0])[1]


def row(
    judge: Judge, name: str, kind: str, make: Callable[[], Method], warm_up: float, prompts: int
) -> dict[str, Any] | None:
    """Return a line of the table; None where there is no time to measure it."""
    try:
        method = make()
    except Missing:
        return None
    found = []
    for settings in settings_of(prompts):
        try:
            found.append(judge.numbers(plan_of(method, warm_up), settings))
        except Missing:
            break
    if not found:
        return None
    mean = {
        key: round(sum(f[key] for f in found) / len(found), 4)
        for key in ("psnr_db", "ssim", "density", "computed", "attention_s", "prompt")
    }
    return {
        "name": name,
        "kind": kind,
        "params": to_params(method),
        "warm_up": round(warm_up, 4),
        "prompts": len(found),
        **mean,
        "psnr_db_each": [round(f["psnr_db"], 2) for f in found],
        "revisions": sorted({f["revision"] for f in found}),
    }


def clips(
    judge: Judge, share: float, prompts: int, show: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Return the lines of one executed share, parts and published combinations."""
    parts = [(n, "part", part_ladder(extra)) for n, extra in PARTS.items()]
    others = [(n, "combination", ladder) for n, ladder in COMBINATIONS.items()]
    ladders = [parts[0], *others, *parts[1:]]  # what matters most first, should time run out
    lines = []
    for name, kind, ladder in ladders:

        def make(ladder: Ladder = ladder) -> Method:
            return matched(judge, ladder, share, 0.0)

        found = row(judge, name, kind, make, 0.0, prompts)
        if found is not None:
            lines.append(found)
            show(found)
    return lines


def warm_ups(
    judge: Judge, prompts: int, show: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Return lines behind dense steps, and of heads that leave these by the meter."""
    ladders = {
        "metered": part_ladder({}),
        "paro": _board_ladder("paro", "one threshold"),
        "psa": _board_ladder("psa", "by importance"),
    }
    lines = []
    for name, ladder in ladders.items():
        for warm in (WARM_UP / 2, WARM_UP):

            def make(ladder: Ladder = ladder, warm: float = warm) -> Method:
                return matched(judge, ladder, 0.2, warm)

            lines.append(row(judge, name, "warm-up", make, warm, prompts))
    base = part_ladder({})
    for limit in (0.05, 0.1):

        def leaving(limit: float = limit) -> Method:
            given = to_params(matched(judge, base, 0.2, 0.0))
            return build("metered", {**given, "start": WARM_UP, "limit": limit})

        name = f"metered, heads start sparse once their error is below {limit:g}"
        lines.append(row(judge, name, "warm-up", leaving, 0.0, prompts))
    done = [line for line in lines if line is not None]
    for line in done:
        show(line)
    return done


def _board_ladder(name: str, label: str) -> Ladder:
    return next(x for x in ladders_for(name, DEMO_GRID) if x.label == label)


def heads(judge: Judge, board: Path) -> dict[str, Any]:
    """Return the errors of every head on recorded attention, by density and method."""
    labels = variants_of(board)
    chosen: dict[str, dict[str, Method]] = {}
    for share in DENSITIES:
        ladders = {n: part_ladder(extra) for n, extra in PARTS.items()} | COMBINATIONS
        for name in OTHERS:
            found = ladders_for(name, DEMO_GRID)
            ladders[name] = next((x for x in found if x.label == labels.get(name)), found[0])
        chosen[f"{share:g}"] = {
            name: ladder.make(share) if name in OTHERS else matched(judge, ladder, share, 0.0)
            for name, ladder in ladders.items()
        }
    return errors_of_heads(judge.pipe, settings_of(1)[0], chosen)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=600, help="stop making clips after this")
    parser.add_argument("--density", type=float, action="append", help="executed; default .2 .3")
    parser.add_argument("--only", action="append", choices=("clips", "warm", "heads", "cost"))
    parser.add_argument("--board", type=Path, default=ROOT / "docs/results/scoreboard.json")
    parser.add_argument("--out", type=Path, default=ROOT / "out/ablation")
    parser.add_argument("--work", type=Path, default=ROOT / "out/scoreboard")
    given = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + given.minutes * 60
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(
        pipe,
        Store(work_folder(pipe, given.work, "cpu")),
        lambda: time.monotonic() < deadline,
    )
    target = given.out / "results" / "metered.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(target.read_text()) if target.exists() else {}
    parts: dict[str, Callable[[], Any]] = {
        "heads": lambda: heads(judge, given.board),
        "cost": costs,
        "clips": lambda: {
            **content.get("clips", {}),
            **{f"{d:g}": clips(judge, d, given.prompts, _show) for d in given.density or DENSITIES},
        },
        "warm": lambda: warm_ups(judge, given.prompts, _show),
    }
    for name, measure in parts.items():
        if given.only is None or name in given.only:
            content[name] = measure()
            write_text(target, json.dumps(content, indent=1) + "\n")
    board = json.loads(given.board.read_text())
    write_text(given.out / "metered.md", page(content, board))


def _show(line: dict[str, Any]) -> None:
    words = f"{line['name']}: {line['psnr_db']:.2f} dB at {line['computed']:.3f} executed"
    print(words, f"({line['prompts']} prompts)", flush=True)


if __name__ == "__main__":
    main()
