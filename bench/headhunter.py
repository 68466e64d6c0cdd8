"""HeadHunter on the embedded model: found heads beside random ones, on held-out prompts.

Without classifier-free guidance and with few steps the model leaves room to improve. The search
uses prompts of `bench/search_prompts.txt`; the score is taken on pairs of the shipped held-out set.
A killed run goes on where it was.

    python bench/headhunter.py --out docs/results/headhunter.json
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dittools.methods.headhunter import HeadHunter
from dittools.metrics.prompt_score import prompt_margins, score_clip
from dittools.patches import attach
from dittools.pipelines import load
from dittools.pipelines.compare import environment
from dittools.pipelines.demo import DEMO_DEFAULTS
from dittools.pipelines.demo.score import held_out_pairs
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.output import write_text
from dittools.searching.guidance import Found, search_guidance
from dittools.searching.run import work_folder
from dittools.searching.store import Result, Store, Unit, fingerprint, read_prompts

PROMPTS = Path(__file__).with_name("search_prompts.txt")
ATTRIBUTES = ("background", "texture", "colour", "shape", "motion", "all")


def main() -> None:
    """Search, score the held-out pairs, and write the table."""
    args = options()
    torch.set_num_threads(args.threads)
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    found = search_guidance(
        pipe,
        read_prompts(PROMPTS)[: args.prompts],
        "demo",
        rounds=args.rounds,
        top_k=args.top_k,
        scale=args.scale,
        u=args.u,
        steps=args.steps,
        seed=args.seed,
        work=args.work,
        progress=said,
    )
    store = Store(work_folder(pipe, args.work, "cpu"), said)
    rows = held_out(pipe, store, found, args)
    content = {
        "format": "dittools-headhunter-bench",
        "version": 1,
        "environment": environment(),
        "steps": args.steps,
        "classifier_free_guidance": 1.0,
        "scale": args.scale,
        "u": args.u,
        "held_out_pairs": args.pairs,
        "search": {k: v for k, v in found.details.items() if k not in ("versions", "format")},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(content, indent=1) + "\n")
    for row in rows:
        heads = " ".join(row["heads"])
        print(
            f"{row['name']:<12} score {row['margin']['all']:.3f}"
            f" ({row['gain']:+.3f} +- {row['gain_standard_error']:.3f}),"
            f" passes {row['passed']['all']:.3f}  {heads}"
        )


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--scale", type=float, default=1.5)
    parser.add_argument("--u", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=16, help="held-out pairs")
    parser.add_argument("--draws", type=int, default=3, help="draws of random heads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("out/headhunter"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/headhunter.json"))
    return parser.parse_args()


def held_out(
    pipe: Any, store: Store, found: Found, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return one row per choice of heads, each on the same held-out pairs."""
    pool = sorted(found.rounds[0].scores)
    sets = {"no guidance": (), "found": found.heads}
    for draw in range(args.draws):
        sets[f"random {draw + 1}"] = tuple(random.Random(draw).sample(pool, len(found.heads)))
    every = held_out_pairs()
    step = max(1, len(every) // args.pairs)
    keys = ("height", "width", "frames")
    size: dict[str, Any] = {name: DEMO_DEFAULTS[name] for name in keys}
    settings = [
        Settings(p.prompt, seed=p.seed, steps=args.steps, guidance=1.0, **size)
        for p in every[::step][: args.pairs]
    ]
    rows: list[dict[str, Any]] = []
    for name, heads in sets.items():
        clips = measured(pipe, store, tuple(heads), settings, args)
        rows.append(row_of(name, list(heads), clips, rows[0]["each"] if rows else None))
    for scale in (4.0,):  # for comparison: classifier-free guidance as shipped
        guided = [replace(s, guidance=scale) for s in settings]
        rows.append(
            row_of(f"CFG {scale:g}", [], measured(pipe, store, (), guided, args), rows[0]["each"])
        )
    return rows


def measured(
    pipe: Any,
    store: Store,
    heads: tuple[str, ...],
    settings: list[Settings],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Return margins and verdicts of every pair, each generated once."""

    def make(use: Settings) -> Callable[[], Result]:
        def run() -> Result:
            if heads:
                with attach(pipe, HeadHunter(heads, args.scale, args.u)):
                    frames = generate(pipe, use).frames
            else:
                frames = generate(pipe, use).frames
            verdict = score_clip(frames, use.prompt).to_dict()
            both = {"margin": prompt_margins(frames, use.prompt), "passed": verdict}
            text = json.dumps(both).encode()
            return {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

        return run

    mark = fingerprint(sorted(heads), args.scale if heads else 0, args.u if heads else 0)
    units = [
        Unit(f"headhunter bench {mark} {fingerprint(use.to_dict())}", number, make(use))
        for number, use in enumerate(settings)
    ]
    results = store.run(f"held out, {' '.join(heads) or settings[0].guidance}", units)
    return [json.loads(result["json"].numpy().tobytes()) for result in results]


def row_of(
    name: str, heads: list[str], clips: list[dict[str, Any]], plain: list[float] | None
) -> dict[str, Any]:
    """Return means over the pairs, and the paired gain over no guidance."""
    names = list(clips[0]["margin"])
    each = [clip["margin"]["all"] for clip in clips]
    gains = np.subtract(each, plain if plain is not None else each)
    error = float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else 0.0
    return {
        "name": name,
        "heads": heads,
        "margin": {n: round(float(np.mean([c["margin"][n] for c in clips])), 4) for n in names},
        "passed": {
            n: round(float(np.mean([c["passed"][n] is True for c in clips])), 4) for n in ATTRIBUTES
        },
        "gain": round(float(gains.mean()), 4),
        "gain_standard_error": round(error, 4),
        "each": [round(value, 4) for value in each],
    }


_SEEN: "itertools.count[int]" = itertools.count()


def said(what: str, done: int, total: int) -> None:
    """Print progress now and then."""
    if done == total or next(_SEEN) % 10 == 0:
        print(f"{what}: {done} of {total}", flush=True)


if __name__ == "__main__":
    main()
