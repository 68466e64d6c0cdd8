"""A plan search and a head atlas as jobs of the studio, and the frontier as a plot."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dittools.errors import InputError
from dittools.pipelines.generate import Settings
from dittools.pipelines.output import write_text
from dittools.reading import misfit, read_json
from dittools.searching.api import make_request, search
from dittools.searching.candidates import NEVER
from dittools.searching.estimate import Estimate, estimate
from dittools.searching.inspect import atlas, atlas_page
from dittools.studio.engine import Job
from dittools.studio.memory import check_memory
from dittools.studio.runs import Run, RunStore
from dittools.studio.sizes import ModelCalls, counted

TARGETS = {  # what a person picks -> keyword of `search`, unit
    "density": ("target_density", "share of query-key pairs worked through, 0 to 1"),
    "PSNR": ("min_psnr", "dB against dense, at least"),
    "speed-up": ("target_speedup", "times as fast as dense"),
}
_POINT = {"density": float, "psnr_db": float}
_FRONTIER = {
    "predicted": [_POINT],
    "singles": [
        {
            "method": str,
            "name": str,
            "density": float,
            "predicted_db": float,
            "held_out": ({"psnr_db": float}, None),
        }
    ],
    "trials": [_POINT],
    "chosen": _POINT,
}
WORK = "search-work"  # below the run folder: finished units, so that a stopped search goes on


@dataclass(frozen=True)
class SearchOrder:
    """What a person asks of a search.

    Attributes:
        prompts: one is enough; every second one is held out.
        target: key of TARGETS.
        value: what it should be.
        methods: names in METHODS; empty takes all.
        budget: "quick", "standard" or "thorough".
        settings: size, steps and seed, as `search` takes them.
    """

    prompts: list[str]
    target: str
    value: float
    methods: tuple[str, ...]
    budget: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse, before anything is loaded, what no search can do."""
        if self.target not in TARGETS:
            raise InputError("no such target", expected=", ".join(TARGETS), got=repr(self.target))
        make_request(
            object(), self.prompts, **{**self.wanted, "steps": self.settings["steps"] or 1}
        )

    @property
    def wanted(self) -> dict[str, Any]:
        """Keywords of `search`."""
        return {
            TARGETS[self.target][0]: self.value,
            "methods": self.methods,
            "budget": self.budget,
            **self.settings,
        }

    @property
    def title(self) -> str:
        """One line for the history."""
        return f"{self.target} {self.value:g}: {self.prompts[0]}"


def methods_to_search(known: Any) -> list[str]:
    """Return the methods a search may use, floors and ceilings left out."""
    return [name for name in known if name not in NEVER]


def run_search(order: SearchOrder, model: str, runs: RunStore, pipe: Any, job: Job) -> Run:
    """Return the finished run of a search; posts "estimate", "curve", "singles" and "trials".

    Stopping leaves the finished units below the run folder: the same order goes on from there.
    """
    check_memory(pipe, Settings(order.prompts[0], **order.settings))
    calls = _calls(pipe, job, estimate(pipe, make_request(pipe, order.prompts, **order.wanted)))
    trials: list[dict[str, Any]] = []

    def watch(name: str, value: Any) -> None:
        if name == "trial":
            trials.append(value)
            name, value = "trials", list(trials)
        job.post(name, value)

    folder = runs.begin()
    try:
        with counted(pipe, calls):
            result = search(
                pipe,
                order.prompts,
                **order.wanted,
                out=folder / "plan.json",
                work=runs.root / WORK,
                progress=calls.report,
                watch=watch,
            )
        found = {**result.atlas, "model": _model(result.frontier["model"])}
        files = {**result.files, "atlas": folder / "atlas.json"}
        write_text(files["atlas"], json.dumps(found))
        side = folder / "plan.safetensors"
        if side.exists():
            files["tensors"] = side
        facts = {
            "model": model,
            "prompts": order.prompts,
            "target": order.target,
            "value": order.value,
            "methods": list(order.methods),
            "budget": order.budget,
            "settings": order.settings,
            "met": result.met,
            "remark": result.remark,
            "chosen": result.frontier["chosen"],
        }
        return runs.finish(folder, "search", order.title, facts, files)
    except BaseException:
        runs.discard(folder)
        raise


def run_atlas(
    prompts: list[str],
    methods: tuple[str, ...],
    settings: dict[str, Any],
    model: str,
    runs: RunStore,
    pipe: Any,
    job: Job,
) -> Run:
    """Return the finished run of a head atlas of a model."""
    options: dict[str, Any] = {"methods": methods, "budget": "quick", **settings}
    check_memory(pipe, Settings(prompts[0], **settings))
    request = make_request(pipe, prompts, target_density=1.0, **options)
    found = estimate(pipe, request)
    per_unit = found.forwards // sum(found.generations.values())
    calls = ModelCalls(job, per_unit, per_unit * len(request.calibration))
    folder = runs.begin()
    try:
        with counted(pipe, calls):
            seen = atlas(pipe, prompts, work=runs.root / WORK, progress=calls.report, **options)
        files = {"atlas": folder / "atlas.json", "page": folder / "atlas.html"}
        write_text(files["atlas"], json.dumps(seen))
        write_text(files["page"], atlas_page(seen))
        facts = {"model": model, "prompts": prompts, "methods": methods, "settings": settings}
        return runs.finish(folder, "atlas", prompts[0], facts, files)
    except BaseException:
        runs.discard(folder)
        raise


def _calls(pipe: Any, job: Job, found: Estimate) -> ModelCalls:
    job.post("estimate", found.to_dict())
    return ModelCalls(job, found.forwards // sum(found.generations.values()), found.forwards)


def _model(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("class", "layers", "heads", "head_dim")}


def read_frontier(path: Path) -> dict[str, Any]:
    """Return what `figure` draws of a finished search.

    Raises:
        InputError: the file cannot be read or is no frontier.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {path.name}", got=type(error).__name__, remedy="search again"
        ) from error
    wrong = misfit(found, _FRONTIER, "the frontier")
    if wrong:
        raise InputError(f"cannot read {path.name}", got=wrong, remedy="search again")
    return {
        "curve": found["predicted"],
        "singles": found["singles"],
        "trials": found["trials"],
        "chosen": found["chosen"],
    }
