"""`dittools.search`: say what you want, get the plan, its price and its proof."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dittools.errors import InputError
from dittools.patches import detach
from dittools.pipelines.output import check_writable, disk_errors, write_text
from dittools.plans import Plan
from dittools.searching import run as running
from dittools.searching.cost import CostTable, save_costs
from dittools.searching.frontier import atlas_of, frontier_of
from dittools.searching.points import Watch
from dittools.searching.report import page
from dittools.searching.request import (
    DEFAULT_RANGES,
    Budget,
    Constraints,
    Request,
    budget_of,
    check_prompts,
    settings_for,
    target_of,
)
from dittools.searching.store import ROOM


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        plan: ready for `attach`; `plan.measured` holds its held-out scores.
        frontier: what frontier.json holds: predicted curve, verified plans, single methods.
        met: whether the target was met.
        remark: one sentence on that.
        atlas: what every head looks at, and every candidate's error there.
        costs: kernel times the search went by.
        files: what was written, by name.
    """

    plan: Plan
    frontier: dict[str, Any]
    met: bool
    remark: str
    atlas: dict[str, Any] = field(repr=False)
    costs: CostTable = field(repr=False)
    files: dict[str, Path] = field(default_factory=dict)


def make_request(
    pipe: Any,
    prompts: Sequence[str] | str | Path,
    *,
    target_density: float | None = None,
    min_psnr: float | None = None,
    target_speedup: float | None = None,
    methods: Sequence[str] = (),
    budget: str | Budget = "standard",
    constraints: Constraints | None = None,
    ranges: tuple[float, ...] = DEFAULT_RANGES,
    carry: float | None = None,
    sensitivity: str = "perturbation",
    **settings: Any,
) -> Request:
    """Return the checked request of `search`; the arguments are the same."""
    target, value = target_of(target_density, min_psnr, target_speedup)
    return Request(
        check_prompts(prompts),
        settings_for(pipe, settings),
        target,
        value,
        tuple(methods),
        budget_of(budget),
        constraints or Constraints(),
        ranges,
        carry,
        sensitivity,
    )


def search(
    pipe: Any,
    prompts: Sequence[str] | str | Path,
    *,
    target_density: float | None = None,
    min_psnr: float | None = None,
    target_speedup: float | None = None,
    methods: Sequence[str] = (),
    budget: str | Budget = "standard",
    constraints: Constraints | None = None,
    ranges: tuple[float, ...] = DEFAULT_RANGES,
    carry: float | None = None,
    sensitivity: str = "perturbation",
    backend: str = "auto",
    out: str | Path | None = None,
    work: str | Path | None = None,
    progress: running.Report | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> SearchResult:
    """Return the plan that meets one target on this model, verified on held-out prompts.

    The same inputs and seed give the same plan and frontier, byte for byte; a target speed-up also
    depends on times, of kernels and of the generations that verify it, each measured once per work
    folder.

    Args:
        pipe: a stock pipeline; what is attached to it is taken off.
        prompts: texts, or the path of a UTF-8 file with one a line. Every second one is held out.
        target_density: share of query-key pairs over the whole run, dense steps counted as 1.
        min_psnr: dB against the dense generation, mean over the held-out prompts.
        target_speedup: of a whole generation; median over the held-out prompts of dense over own
            wall time, timed one after the other.
        methods: names in METHODS; empty takes all.
        budget: "quick", "standard", "thorough", or counts of your own.
        constraints: layers and heads that stay dense, methods left out, kernels per layer ...
        ranges: edges of the step ranges that get rules of their own, as shares of the run.
        carry: weight of the density in Sparse-vDiT's greedy choice, whose errors later layers then
            see during calibration; None calibrates on dense inputs.
        sensitivity: "perturbation" weighs layers and step ranges by generations that are sparse
            there alone; "gradient" weighs every head by a backward pass through the sampler.
        backend: a named attention backend, or "auto" for the device's.
        out: plan file; frontier.json, report.html and cost.json are written beside it.
        work: folder in which finished units are kept, so that a killed search goes on; by default
            beside `out`, and nowhere without `out`.
        progress: called with (what, units done, units in all), first with none done.
        watch: called with (name, JSON value) for every part of the frontier as soon as it is known:
            "curve", "singles" and each "trial", as in frontier.json.
        **settings: height, width, frames, steps, guidance, negative_prompt, seed.
    Raises:
        InputError: a target that cannot be reached says what can; wrong prompts or options.
        AttachError: nothing in the pipeline can be accelerated.
    """
    request = make_request(
        pipe,
        prompts,
        target_density=target_density,
        min_psnr=min_psnr,
        target_speedup=target_speedup,
        methods=methods,
        budget=budget,
        constraints=constraints,
        ranges=ranges,
        carry=carry,
        sensitivity=sensitivity,
        **settings,
    )
    target = None if out is None else Path(out)
    if target is not None:
        check_writable(target.parent)
        if target.is_dir():
            raise InputError(
                f"cannot write a plan to {target}", expected="a file name", got="a folder"
            )
    folder = Path(work) if work is not None else default_work(target)
    detach(pipe)
    told, seen = progress or (lambda *_: None), watch or (lambda *_: None)
    outcome = running.run(pipe, request, folder, backend, told, seen)
    choice = outcome.verdict.chosen.solution.choice
    result = SearchResult(
        outcome.plan,
        frontier_of(outcome),
        outcome.verdict.met,
        outcome.verdict.remark,
        atlas_of(outcome.table, choice),
        outcome.solver.costs,
    )
    from dittools.pipelines.ranks import is_main

    if target is not None and is_main():
        result.files.update(write(result, target))
    return result


def default_work(out: Path | None) -> Path | None:
    """Return the work folder of a plan file: hidden, beside it."""
    return None if out is None else out.parent / f".{out.stem}.search"


def write(result: SearchResult, out: Path) -> dict[str, Path]:
    """Write plan, frontier, report and cost table; each appears whole or not at all.

    Raises:
        InputError: the disk is full or the folder cannot be written to; old files stay whole.
    """
    folder = out.parent
    files = {
        "plan": out,
        "frontier": folder / "frontier.json",
        "report": folder / "report.html",
        "cost": folder / "cost.json",
    }
    with disk_errors(f"cannot write the results to {folder}", ROOM):
        write_text(files["frontier"], json.dumps(result.frontier, indent=1) + "\n")
        write_text(files["report"], page(result.frontier, result.atlas, result.costs))
        save_costs(result.costs, files["cost"])
        result.plan.save(out)  # last: a plan file means that the rest is there
    return files
