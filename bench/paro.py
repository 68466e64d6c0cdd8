"""Calibrated PAROAttention beside the online form and random blocks, on prompts it has not seen.

    python bench/paro.py [--density 0.4] [--held-out 4] [--out docs/results/paro.json]

Orders and static masks are calibrated on two prompts of `bench/search_prompts.txt` on the embedded
model; the others, as many as asked for, are generated dense and with every form. No step and no
layer stays dense, and all forms keep the same share of 32-token blocks. Seconds are CPU seconds of
one thread for whole clips.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dittools.methods import build
from dittools.metrics.fidelity import compare
from dittools.patches import attach
from dittools.pipelines.generate import generate
from dittools.pipelines.load import load
from dittools.plans import Plan
from dittools.searching.calibrate_paro import Choices, calibrate, request_of

PROMPTS = Path(__file__).with_name("search_prompts.txt")
BLOCK = 32  # tokens, as on the scoreboard


def forms(pipe: Any, prompts: list[str], choices: Choices) -> dict[str, tuple[Plan, float]]:
    """Return the plans by name, and the CPU seconds it took to make each."""
    made: dict[str, tuple[Plan, float]] = {}
    for orders in ("recall", "paper"):
        started = time.process_time()
        own = Choices(**{**choices.__dict__, "orders": orders, "held_out": 0})
        plan = calibrate(pipe, prompts, own)
        made[f"calibrated, orders by {orders}"] = plan, time.process_time() - started
    density = {"density": choices.target_density, "block_size": BLOCK}
    for name in ("paro", "random"):
        method = build(name, density)
        made["online" if name == "paro" else name] = Plan.of(method), 0.0
    return made


def main() -> int:
    """Calibrate, generate, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--density", type=float, default=0.4)
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    prompts = PROMPTS.read_text().splitlines()
    choices = Choices(given.density, block_size=BLOCK, held_out=given.held_out)
    request = request_of(pipe, prompts, choices, {})
    plans = forms(pipe, prompts, choices)
    rows: dict[str, dict[str, Any]] = {
        name: {"psnr_db_each": [], "density": 0.0, "cpu_seconds": 0.0, "to_make": round(spent, 1)}
        for name, (_, spent) in plans.items()
    }
    for use in request.held_out:
        dense = generate(pipe, use).frames
        for name, (plan, _) in plans.items():
            started = time.process_time()
            with attach(pipe, plan) as handle:
                frames = generate(pipe, use).frames
                density = handle.report().density
            row = rows[name]
            row["cpu_seconds"] += (time.process_time() - started) / len(request.held_out)
            row["density"] += density / len(request.held_out)
            row["psnr_db_each"].append(round(float(compare(dense, frames).psnr_db), 2))
            sys.stdout.write(f"{name:28} {row['psnr_db_each'][-1]:6.2f} dB  {use.prompt}\n")
            sys.stdout.flush()
    for row in rows.values():
        each = row["psnr_db_each"]
        row |= {"psnr_db": round(sum(each) / len(each), 2), "density": round(row["density"], 4)}
        row["cpu_seconds"] = round(row["cpu_seconds"], 1)
    found = {
        "calibration": [use.prompt for use in request.calibration],
        "held_out": [use.prompt for use in request.held_out],
        "rows": rows,
    }
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if given.out:
        given.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
