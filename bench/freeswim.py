"""Objects counted in clips beyond the training size: naive sampling, window alone, both lanes.

    python bench/freeswim.py                        # docs/results/freeswim.json, docs/freeswim.png
    python bench/freeswim.py --pairs 2 --scale 3    # three times the trained side

Every prompt asks for one object, and none of its looks was ever drawn in training. All ways that
refine start from the same clip at the native size, made with the same seed. Clips are kept under
--work, and a run that was stopped goes on from them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dittools.metrics.prompt_score import observe, score_clip
from dittools.pipelines import freeswim, load
from dittools.pipelines.demo import DEFAULT_FRAMES, DEFAULT_GUIDANCE, DEFAULT_HEIGHT
from dittools.pipelines.demo.score import Pair, held_out_pairs
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.output import Frames, contact_sheet, write_text

ROOT = Path(__file__).parents[1]
STRIDE = 11  # of the 64 held-out pairs, so that colours, shapes, motions and grounds vary
WAYS = {
    "native": "the stock pipeline at the trained size",
    "naive": "the stock pipeline at the large size",
    "sdedit": "enlarged and refined, stock attention",
    "window": "enlarged and refined, FreeSwim's window alone",
    "override": "enlarged and refined, both lanes of FreeSwim",
}


def ways(pipe: Any, args: argparse.Namespace) -> dict[str, Callable[[Pair, Frames], Frames]]:
    side = DEFAULT_HEIGHT * args.scale

    def plain(pair: Pair, size: int) -> Frames:
        settings = Settings(
            pair.prompt, None, pair.seed, args.steps, DEFAULT_FRAMES, size, size, DEFAULT_GUIDANCE
        )
        return generate(pipe, settings).frames

    def refined(pair: Pair, native: Frames, **options: Any) -> Frames:
        made = freeswim(
            pipe, pair.prompt, height=side, width=side, frames=DEFAULT_FRAMES, steps=args.steps,
            guidance=DEFAULT_GUIDANCE, seed=pair.seed, video=native, strength=args.strength,
            **options,
        )  # fmt: skip
        return made.frames

    return {
        "native": lambda pair, _: plain(pair, DEFAULT_HEIGHT),
        "override": lambda pair, native: refined(
            pair, native, mode="override", cache_interval=args.interval
        ),
        "window": lambda pair, native: refined(pair, native, mode="window"),
        "naive": lambda pair, _: plain(pair, side),
        "sdedit": lambda pair, native: refined(
            pair, native, mode="window", native_height=side, native_width=side, attn_temperature=1.0
        ),
    }


def clips_of(pipe: Any, pair: Pair, args: argparse.Namespace) -> dict[str, Frames]:
    """Return the clip of every way, made or read back."""
    found: dict[str, Frames] = {}
    for name, make in ways(pipe, args).items():
        mark = f"{args.scale}-{args.strength}-{args.steps}-{args.interval}-{args.dtype}"
        path = args.work / f"{mark}-{pair.seed}-{name}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, make(pair, found.get("native", np.empty(0, np.float32))))
        found[name] = np.load(path)
    return found


def row(pair: Pair, clips: dict[str, Frames]) -> dict[str, Any]:
    cells = {
        name: {"objects": observe(clip).objects, "all": score_clip(clip, pair.prompt).all}
        for name, clip in clips.items()
    }
    return {"prompt": pair.prompt, "seed": pair.seed, **cells}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {
            "what": what,
            "mean_objects": statistics.mean(r[name]["objects"] for r in rows),
            "one_object": sum(r[name]["objects"] == 1 for r in rows),
            "more_than_one": sum(r[name]["objects"] > 1 for r in rows),
            "as_asked": sum(r[name]["all"] for r in rows),
            "of": len(rows),
        }
        for name, what in WAYS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--scale", type=int, default=2, help="target over trained side")
    parser.add_argument("--strength", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--interval", type=int, default=2, help="of the text attention's refresh")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "freeswim")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "freeswim.json")
    parser.add_argument("--sheet", type=Path, default=ROOT / "docs" / "freeswim.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load("demo", dtype=args.dtype)
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    sheet: list[tuple[str, Frames]] = []
    for pair in held_out_pairs()[::STRIDE][: args.pairs]:
        clips = clips_of(pipe, pair, args)
        rows.append(row(pair, clips))
        for name in ("naive", "window", "override") if len(rows) <= 2 else ():
            count = rows[-1][name]["objects"]
            sheet.append((f"{pair.prompt}: {name}, {count} found", clips[name][:, ::2, ::2]))
        options = {k: getattr(args, k) for k in ("scale", "strength", "steps", "interval", "dtype")}
        result = {"format": "dittools-freeswim-bench", "version": 1, "options": options}
        result |= {"summary": summary(rows), "rows": rows}
        write_text(args.json, json.dumps(result, indent=1) + "\n")
        title = f"{args.scale} x the trained side; every prompt asks for one object"
        contact_sheet(args.sheet, title, sheet)
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
