"""The comparison report of `dittools bench compare`, made from runs of the history."""

from pathlib import Path
from typing import Any

from dittools.commands.compare_page import compare_page
from dittools.errors import InputError
from dittools.metrics.latency import Spread
from dittools.metrics.results import FORMAT, VERSION, checked, load_results
from dittools.reading import read_json
from dittools.studio.runs import Run

Document = tuple[Path, dict[str, Any]]
MOST = 8  # runs in one report: their clips are embedded


def report_of(chosen: list[Run]) -> str:
    """Return the HTML of a comparison of runs.

    Raises:
        InputError: none or too many are chosen, or one holds nothing to compare.
    """
    if not 1 <= len(chosen) <= MOST:
        raise InputError("runs to compare", expected=f"1 to {MOST}", got=str(len(chosen)))
    return compare_page([document_of(run) for run in chosen])


def can_compare(run: Run) -> bool:
    """Return whether a run holds what a comparison needs."""
    needed = {"bench": ("results",), "generate": ("report", "dense", "accelerated")}
    return run.kind in needed and all(run.path(name) for name in needed[run.kind])


def document_of(run: Run) -> Document:
    """Return a run as a results document, with a path for its name and for finding its clips.

    Raises:
        InputError: the run holds no measurement.
    """
    results, report = run.path("results"), run.path("report")
    if run.kind == "bench" and results is not None:
        return run.folder / run.id, load_results(results)
    if run.kind != "generate" or report is None or not can_compare(run):
        raise InputError(f"run {run.id} holds nothing to compare", expected="a dense clip too")
    try:
        found = _converted(read_json(report), run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"the report of run {run.id} is damaged", got=type(error).__name__
        ) from error
    return run.folder / run.id, checked(found, run.folder / run.id)


def _converted(report: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return a generation's report in the words of a results file; what it lacks stays empty."""
    known = report["environment"]
    packages = ("python", "dittools", "torch", "diffusers", "transformers", "triton")
    named = {"other_seed": "another seed", "random_blocks": "random blocks"}
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": report["created"],
        "hardware": {key: known.get(key) for key in ("machine", "gpu", "threads")},
        "versions": {name: known.get(name, "") for name in packages},
        "git": {"revision": "", "dirty": False},
        "run": {"model": report["model"], **report["settings"]},
        "cases": [_case(report, run, "dense"), _case(report, run, "accelerated")],
        "floors": {named.get(name, name): floor for name, floor in report["floors"].items()},
    }


def _case(report: dict[str, Any], run: Run, side: str) -> dict[str, Any]:
    times, is_dense = report[side], side == "dense"
    attention = times["attention_seconds"] * 1000
    total = Spread.of([s * 1000 for s in times["all_seconds"]])
    pairs = zip(report["dense"]["all_seconds"], times["all_seconds"], strict=True)
    density = 1.0 if is_dense else float(report["density"])
    share, scores = report["attention_share"], report["prompt_score"]
    return {
        "name": "dense" if is_dense else report["method"],
        "plan_checksum": "",
        "density": density,
        "total_ms": total.to_dict(),
        "parts_ms": {
            "attention": Spread.of([attention]).to_dict(),
            "everything else": Spread.of([max(total.median - attention, 0.0)]).to_dict(),
        },
        "peak_bytes": None,
        "speedup": Spread.of([slow / fast for slow, fast in pairs]).to_dict(),
        "limit_ms": None,
        "bound": report["speedup_bound"],
        "bound_at_density": 1 / (1 - share * (1 - min(density, 1.0))),
        "fidelity": None if is_dense else report["fidelity"],
        "prompt_score": None if not scores else _score(scores, is_dense),
        "clip": run.files[side],
    }


def _score(scores: dict[str, Any], is_dense: bool) -> dict[str, Any] | None:
    others = [score for name, score in scores.items() if name != "dense"]
    found: dict[str, Any] | None = scores.get("dense") if is_dense else (others or [None])[0]
    return found
