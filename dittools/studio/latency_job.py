"""A latency benchmark as a job of the studio, its table, and its export."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dittools.commands.bench import HEADINGS, table_rows
from dittools.commands.compare_page import parts_plot
from dittools.commands.latency import Bench, run_latency
from dittools.errors import InputError
from dittools.methods import METHODS, preset
from dittools.pipelines.generate import Settings
from dittools.pipelines.output import write_text
from dittools.plans import Plan
from dittools.studio.engine import Job
from dittools.studio.memory import check_memory
from dittools.studio.runs import Run, RunStore

MOST_REPEATS = 50


@dataclass(frozen=True)
class BenchOrder:
    """What a person asks to measure.

    Attributes:
        prompt: what to show.
        methods: names in METHODS; dense is always measured.
        plan: a plan file beside them, "" for none.
        repeats, warm_up: counted and uncounted runs of every case.
        settings: size, steps and seed.
        floors: also another seed, and random blocks at every case's density.
    """

    prompt: str
    methods: tuple[str, ...]
    plan: str
    repeats: int
    warm_up: int
    settings: dict[str, Any]
    floors: bool = False

    def __post_init__(self) -> None:
        """Refuse what measures nothing before anything is loaded."""
        for name in self.methods:
            preset(name, "")  # an unknown name raises
        if not self.methods and not self.plan:
            raise InputError("no case to measure beside dense", remedy="choose a method")
        if not 1 <= self.repeats <= MOST_REPEATS or not 0 <= self.warm_up <= MOST_REPEATS:
            raise InputError("repeats", expected=f"1 to {MOST_REPEATS}, warm-up from 0")

    def targets(self) -> dict[str, Any]:
        """Return case name -> what to attach.

        Raises:
            PlanError: the plan file is gone or damaged.
        """
        found: dict[str, Any] = {name: name for name in self.methods if name != "dense"}
        if self.plan:
            found["plan"] = Plan.load(self.plan)
        if not found:
            raise InputError("no case to measure beside dense", remedy="choose another method")
        return found


def methods_to_measure() -> list[str]:
    """Return the methods that can stand beside dense."""
    return [name for name in METHODS if name != "dense"]


def run_bench(order: BenchOrder, model: str, runs: RunStore, pipe: Any, job: Job) -> Run:
    """Return the finished run of a benchmark."""
    targets, settings = order.targets(), Settings(order.prompt, **order.settings)
    check_memory(pipe, settings)
    bench = Bench(
        model=model,
        settings=settings,
        targets=targets,
        repeats=order.repeats,
        warm_up=order.warm_up,
        device=str(pipe.device),
        dtype=str(_denoiser(pipe).dtype).removeprefix("torch."),
        floors=order.floors,
    )
    job.expect((order.repeats + order.warm_up) * (len(targets) + 1))
    job("counting the arithmetic", 0, 0)
    folder = runs.begin()
    try:
        results = run_latency(pipe, bench, folder, job)
        files = {
            "results": folder / "results.json",
            "table": folder / "latency.csv",
            "plot": folder / "parts.svg",
        }
        write_text(files["table"], table_csv(results))
        write_text(files["plot"], parts_plot(results["cases"]))
        facts = {
            "model": model,
            "prompt": order.prompt,
            "methods": list(targets),
            "repeats": order.repeats,
            "settings": order.settings,
        }
        return runs.finish(folder, "bench", f"{', '.join(targets)}: {order.prompt}", facts, files)
    except BaseException:
        runs.discard(folder)
        raise


def _denoiser(pipe: Any) -> Any:
    found = getattr(pipe, "transformer", None)
    return found if found is not None else pipe.unet


def shown_table(results: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return headings and rows with a case a column, which narrow screens can scroll."""
    columns = [HEADINGS, *table_rows(results)]
    rows = [tuple(column[number] for column in columns) for number in range(1, len(HEADINGS))]
    return [column[0] for column in columns], rows


def table_csv(results: dict[str, Any]) -> str:
    """Return one row per case, numbers unrounded, times in milliseconds."""
    parts = list(results["cases"][0]["parts_ms"])
    names = [
        *("case", "density", "total_ms_p20", "total_ms_median", "total_ms_p80"),
        *(f"{part}_ms_median" for part in parts),
        *("speedup_p20", "speedup_median", "speedup_p80", "bound_at_density", "bound"),
        *("limit_ms", "peak_bytes", "psnr_db", "ssim"),
    ]
    buffer = io.StringIO()
    sheet = csv.writer(buffer, lineterminator="\n")
    sheet.writerow(names)
    for case in results["cases"]:
        total, ratio, close = case["total_ms"], case["speedup"], case["fidelity"] or {}
        sheet.writerow(
            [
                _plain(case["name"]),
                *(case["density"], total["p20"], total["median"], total["p80"]),
                *(case["parts_ms"][part]["median"] for part in parts),
                *(ratio["p20"], ratio["median"], ratio["p80"]),
                *(case["bound_at_density"], case["bound"], case["limit_ms"], case["peak_bytes"]),
                *(close.get("psnr_db"), close.get("ssim")),
            ]
        )
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Keep spreadsheets from reading a name as a formula."""
    return f"'{text}" if text[:1] in "=+-@" else text


def results_of(run: Run) -> dict[str, Any]:
    """Return the results of a finished benchmark.

    Raises:
        InputError: the file is gone or damaged.
    """
    from dittools.metrics.results import load_results

    return load_results(run.path("results") or Path("results.json"))
