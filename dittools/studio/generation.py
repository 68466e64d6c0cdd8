"""The work behind the Generate tab: forecast, dense and accelerated, floors, files, history."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dittools
from dittools.errors import DitToolsError
from dittools.patches import attach
from dittools.pipelines.compare import Comparison, run_comparison
from dittools.pipelines.generate import Run as Generated
from dittools.pipelines.generate import Settings, check_size
from dittools.pipelines.output import write_clip
from dittools.pipelines.session import (
    FPS,
    Request,
    attach_options,
    check_words,
    settings_of,
    target_of,
    write_comparison,
)
from dittools.plans import Plan
from dittools.studio.engine import Cancelled, Job
from dittools.studio.heatmap import difference
from dittools.studio.memory import check_memory, filled
from dittools.studio.runs import Run, RunStore

KIND = "generate"


@dataclass
class Generation:
    """One generation as a job for the engine; call it with (pipeline, job).

    Attributes:
        request: what to generate; its `out` is not used.
        floors: whether to measure another seed and random blocks afterwards.
        store: where the run is kept.
        plan: replaces the request's method.
        remarks: what a person should read about the request.
    """

    request: Request
    floors: bool
    store: RunStore
    plan: Plan | None = None
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what can be refused before a model is loaded."""
        self.settings = settings_of(self.request)
        self.target = self.plan if self.plan is not None else target_of(self.request)
        if self.request.model == "demo":
            check_words(self.settings.prompt, self.remarks.append)

    def __call__(self, pipe: Any, job: Job) -> Run:
        """Return the finished run; a stop during the floors keeps what there is."""
        plan = self.forecast(pipe, job)
        job.expect(self._steps(pipe))
        folder = self.store.begin()
        early: list[Comparison] = []
        try:
            found = self._compare(pipe, job, folder, early)
        except Cancelled:
            if early:
                job.result = self._keep(early[0], plan, folder)
            else:
                self.store.discard(folder)
            raise
        except BaseException:
            self.store.discard(folder)
            raise
        return self._keep(found, plan, folder)

    def forecast(self, pipe: Any, job: Job) -> Plan:
        """Check size and memory, post what the plan promises, and return the plan."""
        check_size(pipe, self.settings)
        check_memory(pipe, self.settings)
        plan = self.attached_plan(pipe)
        job.post("forecast", look_ahead(pipe, plan, self.settings, job))
        return plan

    def attached_plan(self, pipe: Any) -> Plan:
        """Return the plan that will run, with the presets of the model's family filled in."""
        options = attach_options(self.request)
        with attach(pipe, self.target, backend=self.request.backend, **options) as handle:
            return handle.plan

    def _compare(self, pipe: Any, job: Job, folder: Path, early: list[Comparison]) -> Comparison:
        clips: dict[str, str] = {}

        def made(name: str, run: Generated) -> None:
            clips[name] = str(write_clip(folder / f"{name}.mp4", run.frames, FPS))
            job.post("clips", dict(clips))

        def compared(found: Comparison) -> None:
            early.append(found)
            job.post("report", found.to_dict())

        return run_comparison(
            pipe,
            self.settings,
            self.target,
            model=self.request.model,
            repeats=self.request.repeats,
            backend=self.request.backend,
            options=attach_options(self.request),
            step=job,
            floors=self.floors,
            made=made,
            compared=compared,
        )

    def _keep(self, found: Comparison, plan: Plan, folder: Path) -> Run:
        """Write everything and enter the run into the history."""
        result = write_comparison(found, folder)
        heat, scale = difference(found.dense.run.frames, found.accelerated.run.frames)
        files = dict(result.files)
        files["difference"] = write_clip(folder / "difference.mp4", heat, FPS)
        files["plan"] = plan.save(folder / "plan.json")
        if (folder / "plan.safetensors").exists():
            files["plan tensors"] = folder / "plan.safetensors"
        facts = {**self.facts(), "report": result.report, "difference_scale": scale}
        return self.store.finish(folder, KIND, self.settings.prompt, facts, files)

    def facts(self) -> dict[str, Any]:
        """Return what makes the run again, as JSON types."""
        request = self.request
        return {
            "model": request.model,
            "settings": self.settings.to_dict(),
            "method": request.method,
            "params": request.params,
            "dense_steps": request.dense_steps,
            "dense_layers": request.dense_layers,
            "repeats": request.repeats,
            "device": request.device,
            "dtype": request.dtype,
            "from_plan": isinstance(self.target, Plan),
            "frames_per_second": FPS,
        }

    def _steps(self, pipe: Any) -> int:
        """Return how many denoising steps the whole job takes."""
        steps = filled(pipe, self.settings).steps or 50
        runs = 2 * self.request.repeats + (2 if self.floors else 0)
        return 2 * min(steps, 2) + runs * steps


def look_ahead(pipe: Any, plan: Plan, settings: Settings, job: Job) -> dict[str, Any]:
    """Return the forecast of a plan as JSON types; {"error": why} where there is none."""
    job("looking ahead", 0, 0)
    size = {name: getattr(settings, name) for name in ("height", "width", "frames", "steps")}
    try:
        found = dittools.forecast(pipe, plan, **size, guidance=settings.guidance)
    except DitToolsError as error:
        return {"error": str(error)}
    return found.to_dict()
