"""Damaged plans by the thousand: each ends in a plan that runs, or in one readable error.

    python bench/fuzz_plans.py [--plans 100000] [--seed 0] [--out docs/results/fuzz.json]

An escape is any other exception, a file opened or written outside the plan's folder, a program
started, an error of many lines, or a call that takes 10 s. What loads is saved, loaded again and
compared; one in ten of them also runs a small attention call. Escapes are printed with the seed
that makes them again (`--seed N --plans 1`).
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hostile import Escape, Files, Guard, damage, lay_out

from dittools import system
from dittools.call import AttentionCall
from dittools.errors import DitToolsError
from dittools.grid import TokenGrid
from dittools.kernels import load as backend
from dittools.methods import METHODS, build
from dittools.methods.headhunter import HeadHunter
from dittools.methods.paro_tables import ParoTables
from dittools.methods.presets import PUBLISHED
from dittools.pipelines.output import write_text
from dittools.plans import ModelFacts, Plan, Rule, Schedule

ROOT = Path(__file__).parents[1]
FACTS = ModelFacts("WanTransformer3DModel", 4, 2, 16, tuple(f"blocks.{n}.attn1" for n in range(4)))
LONGEST = 10.0  # seconds
GRID = TokenGrid(3, 4, 4, text_after=5)


def tables() -> ParoTables:
    """Calibrated tables of a small grid, two layers and two heads."""
    grid = TokenGrid(4, 4, 4)
    masks = torch.rand(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    orders = torch.tensor([[0, 3], [5, 1]])
    return ParoTables.pack(grid, 16, orders, masks, [0, 1], [0, 1, 1])


@lru_cache(maxsize=1)
def seeds() -> list[Files]:
    """Valid plans to start from: every method, published settings, tensors, guidance, branches."""
    every = [build(name) for name in METHODS]
    every += [build(name, found.params) for (name, _), found in PUBLISHED.items()]
    rules = [Rule(m, (0, "blocks.2.attn1"), (1,), (0.25, 1.0), "cond") for m in every[1:4]]
    found = [
        *(Plan((Rule(method),), Schedule(0.25, 1, 1)) for method in every),
        Plan(tuple(rules), model=FACTS, provenance={"by": "test", "n": [1]}, measured={"x": 0.5}),
        Plan((Rule(build("paro", {"tables": tables()})),), Schedule(2), FACTS),
        Plan(guidance=HeadHunter(("L1H0", "L2"), 3.0, 0.5, "image")),
        Plan(tuple(rules), tensors={"a": torch.arange(6).view(2, 3), "b": torch.zeros(0, 2)}),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made: list[Files] = []
        for plan in found:
            plan.save(folder / "plan.json")
            made.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
            for path in folder.iterdir():
                path.unlink()
    preset = ROOT / "dittools" / "plans" / "presets" / "demo.json"
    return [*made, *made[-4:] * 4, {"plan.json": preset.read_bytes()}]


@lru_cache(maxsize=1)
def small_call() -> AttentionCall:
    """A call with text, fit for every method's own refusals."""
    shape = (3, 1, GRID.total, 2, 16)
    q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return AttentionCall(q, k, v, GRID, layer=1, step=1, steps=4)


def use(folder: Path, *, runs: bool) -> Plan:
    """Load a plan, save it, load it again, compare, and do with it what a run does."""
    plan = Plan.load(folder / "plan.json")
    again = Plan.load(plan.save(folder / "again.json"))
    if repr(again.rules) != repr(plan.rules) or again.schedule != plan.schedule:
        raise Escape("a plan changes when it is saved")
    try:
        plan.check(FACTS)
    except DitToolsError:
        return plan
    for step in (0, 2):
        for _, method in plan.rules_for(1, FACTS.paths[1], step, 4, FACTS.heads, "cond"):
            if runs and not method.not_supported(small_call()):
                call = small_call()
                out = method.attend(call, backend("reference"))
                if out.shape != call.query.shape:
                    raise Escape(f"{method.name} returns {tuple(out.shape)}")
    return plan


def attempt(guard: Guard, folder: Path, outside: Path, seed: int) -> str:
    """Return "accepted", the name of a documented error, or what escaped."""
    draw = random.Random(seed)
    lay_out(draw, folder, damage(draw, draw.choice(seeds())), outside)
    start = time.monotonic()
    try:
        with guard.watching(folder):
            use(folder, runs=seed % 10 == 0)
        result = "accepted"
    except DitToolsError as error:
        result = type(error).__name__
    except Escape as error:
        return f"seed {seed}: {error}"
    spent = time.monotonic() - start
    return result if spent < LONGEST else f"seed {seed}: took {spent:.0f} s"


def fuzz(plans: int, seed: int) -> dict[str, Any]:
    """Return what became of that many damaged plans."""
    torch.set_num_threads(1)
    guard, found, escapes = Guard(), Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as elsewhere:
        outside = Path(elsewhere) / "secret.safetensors"
        outside.write_bytes(b"not yours")
        folder = Path(scratch)
        for files in seeds():  # valid ones load, and late imports are done
            lay_out(Steady(), folder, files, outside)
            use(folder, runs=True)
        before = system.peak_memory() if system.reset_peak_memory() else None
        for number in range(seed, seed + plans):
            result = attempt(guard, folder, outside, number)
            found[result if " " not in result else "escape"] += 1
            if " " in result:
                escapes.append(result)
                sys.stdout.write(result + "\n")
    after = system.peak_memory()
    grown = None if before is None or after is None else (after - before) // 1_000_000
    return {
        "plans": plans,
        "seed": seed,
        "accepted": found.pop("accepted", 0),
        "escapes": len(escapes),
        "refused": {name: found[name] for name in sorted(found) if name != "escape"},
        "grown_mb": grown,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "examples": escapes[:20],
    }


class Steady(random.Random):
    """Draws the highest value always: no file is left out or replaced."""

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return (start if stop is None else stop) - 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="where the figures go, e.g. docs/results/fuzz.json"
    )
    options = parser.parse_args(argv)
    result = fuzz(options.plans, options.seed)
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if options.out:
        write_text(options.out, text)
    return int(result["escapes"] > 0)


if __name__ == "__main__":
    sys.exit(main())
