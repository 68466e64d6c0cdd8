"""One `generate` request from its options to the files on disk."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dittools import plans
from dittools.errors import InputError
from dittools.methods import Method, build, preset
from dittools.methods.headhunter import HeadHunter
from dittools.metrics.scene import WORDS, Scene, parse, unknown_words
from dittools.patches import attach
from dittools.pipelines import load
from dittools.pipelines.compare import (
    Comparison,
    Step,
    describe,
    environment,
    run_comparison,
)
from dittools.pipelines.demo import DEMO_DEFAULTS
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.load import check_name
from dittools.pipelines.output import (
    check_writable,
    contact_sheet,
    side_by_side,
    write_clip,
    write_text,
)
from dittools.pipelines.report_html import page
from dittools.plans import Plan

DEFAULT_METHOD = "gna"
DEMO_PLAN = Path(plans.__file__).parent / "presets" / "demo.json"  # made by `dittools search`
FPS = 8


@dataclass(frozen=True)
class Request:
    """What the user asked for; None means the model's own default."""

    model: str = "demo"
    prompt: str | None = None
    negative_prompt: str | None = None
    method: str | None = None
    plan: Path | None = None
    params: dict[str, Any] = field(default_factory=dict)
    dense_steps: float | int | None = None
    dense_layers: int | None = None
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    perturb: HeadHunter | None = None
    compare: bool = False
    repeats: int = 3
    backend: str = "auto"
    recorder: bool = True
    dtype: str = "auto"
    device: str = "cpu"
    out: Path = Path("out/generate")


@dataclass(frozen=True)
class Result:
    """The report, as JSON types, and the files written, by what they are."""

    report: dict[str, Any]
    files: dict[str, Path]


def run(request: Request, step: Step | None, note: Callable[[str], None]) -> Result:
    """Generate what a request asks for and write it.

    Args:
        request: the options.
        step: called after every denoising step.
        note: called with remarks a person should read.
    Raises:
        DitToolsError: anything the user can mend, before long work starts wherever possible.
    """
    settings = settings_of(request)
    target = target_of(request)
    check_writable(request.out)
    if request.model == "demo":
        check_words(settings.prompt, note)
    pipe = load(request.model, dtype=request.dtype, device=request.device)
    pipe.set_progress_bar_config(disable=True)
    if request.compare:
        result = _compare(pipe, request, settings, target, step)
    else:
        result = _once(pipe, request, settings, target, step)
    return result


def settings_of(request: Request) -> Settings:
    """Fill in the model's defaults for what a request leaves open."""
    settings = Settings(
        prompt=request.prompt if request.prompt is not None else "",
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        steps=request.steps,
        frames=request.frames,
        height=request.height,
        width=request.width,
        guidance=request.guidance,
    )
    defaults: dict[str, Any] = {}
    if request.model == "demo":
        defaults = dict(DEMO_DEFAULTS)
    elif request.model.startswith("tiny/"):
        from dittools.pipelines.tiny import TINY, settings_for

        if request.model.removeprefix("tiny/") in TINY:
            defaults = settings_for(request.model.removeprefix("tiny/"))
    empty = {name: value for name, value in defaults.items() if getattr(request, name) is None}
    settings = replace(settings, **empty)
    if not settings.prompt:
        check_name(request.model)  # a model that is not there is what to mend first
        raise InputError("no prompt", remedy='--prompt "a red circle moving left"')
    return settings


def check_words(prompt: str, note: Callable[[str], None]) -> None:
    """Tell which words the embedded model does not know; refuse a prompt it cannot read at all."""
    unknown = unknown_words(prompt)
    known = ", ".join(WORDS)
    if unknown and parse(prompt) == Scene():
        raise InputError(
            "the demo model knows none of this prompt",
            expected=f"words out of: {known}",
            got=", ".join(unknown),
            remedy='"a red circle moving left over a blue striped background"',
        )
    if unknown:
        note(f"the demo model does not know: {', '.join(unknown)}. It knows: {known}")


def target_of(request: Request) -> str | Method | Plan:
    """Return what a request wants attached: a method's name, a configured method, or a plan."""
    if request.method is not None and request.plan is not None:
        raise InputError("both a method and a plan are given", remedy="one of --method and --plan")
    if request.plan is not None:
        if request.params:
            raise InputError("--set belongs to a method", remedy="change the plan file instead")
        return Plan.load(request.plan)
    if request.method is None and request.model == "demo" and not request.params:
        return Plan.load(DEMO_PLAN)
    name = request.method or DEFAULT_METHOD
    if request.params:
        return build(name, request.params)
    preset(name, "")  # raises for an unknown name before anything is loaded
    return name


def attach_options(request: Request) -> dict[str, Any]:
    """Return the schedule options a request sets."""
    wanted: dict[str, Any] = {
        "dense_steps": request.dense_steps,
        "dense_layers": request.dense_layers,
        "guidance": request.perturb,
        "recorder": None if request.recorder else False,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _once(
    pipe: Any, request: Request, settings: Settings, target: str | Method | Plan, step: Step | None
) -> Result:
    def progress(done: int, total: int) -> None:
        if step is not None:
            step("generating", done, total)

    with attach(pipe, target, backend=request.backend, **attach_options(request)) as handle:
        made = generate(pipe, settings, progress)
        attachment = handle.report()
    report = {
        "format": "dittools-report",
        "version": 1,
        "environment": environment(),
        "model": request.model,
        "settings": settings.to_dict(),
        "method": describe(target),
        "accelerated": {
            "seconds": made.seconds,
            "report": attachment.to_dict(),
            "text": str(attachment),
        },
    }
    clip = write_clip(request.out / "clip.mp4", made.frames, FPS)
    write_text(request.out / "report.json", json.dumps(report, indent=1))
    return Result(report, {"clip": clip, "report": request.out / "report.json"})


def _compare(
    pipe: Any, request: Request, settings: Settings, target: str | Method | Plan, step: Step | None
) -> Result:
    comparison = run_comparison(
        pipe,
        settings,
        target,
        model=request.model,
        repeats=request.repeats,
        backend=request.backend,
        options=attach_options(request),
        step=step,
    )
    return write_comparison(comparison, request.out)


def write_comparison(comparison: Comparison, out: Path) -> Result:
    """Write clips, contact sheet, report.json and report.html; return the report and the files."""
    report = comparison.to_dict()
    files = _write_clips(comparison, out)
    write_text(out / "report.json", json.dumps(report, indent=1))
    embedded = {"dense": files["dense"], report["method"]: files["accelerated"]}
    write_text(out / "report.html", page(report, embedded))
    files |= {"report": out / "report.json", "page": out / "report.html"}
    return Result(report, files)


def _write_clips(comparison: Comparison, out: Path) -> dict[str, Path]:
    dense, fast = comparison.dense.run.frames, comparison.accelerated.run.frames
    clips = {"dense": dense, comparison.method: fast}
    for name, floor in (
        ("another seed", comparison.other_seed),
        ("random blocks", comparison.random_blocks),
    ):
        if floor is not None:
            clips[name] = floor.run.frames
    return {
        "dense": write_clip(out / "dense.mp4", dense, FPS),
        "accelerated": write_clip(out / "accelerated.mp4", fast, FPS),
        "side by side": write_clip(out / "side_by_side.mp4", side_by_side([dense, fast]), FPS),
        "contact sheet": contact_sheet(
            out / "contact_sheet.png", comparison.settings.prompt, list(clips.items())
        ),
    }
