"""Dense and accelerated runs of one pipeline in turn, split into parts, with bounds and floors."""

import json
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dittools.errors import InputError, PlanError
from dittools.methods import Method, build
from dittools.metrics.fidelity import compare
from dittools.metrics.latency import (
    PartTimer,
    PeakMemory,
    Sample,
    Tell,
    amdahl,
    interleaved,
    speedup,
    summary,
)
from dittools.metrics.prompt_score import score_clip
from dittools.metrics.results import checksum, new_results
from dittools.metrics.work import Work, WorkCounter, probe
from dittools.patches import attach
from dittools.pipelines.generate import Run, Settings, generate
from dittools.pipelines.output import write_clip, write_text
from dittools.pipelines.session import FPS
from dittools.plans import Plan

Target = str | Method | Plan
PARTS = ("attention", "choosing", "rest of transformer", "text encoder", "vae", "other")
COUNTED_STEPS = 2  # arithmetic is counted over so many steps and scaled


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        model: name written into the results.
        settings: of every run; the floors alone use another seed.
        targets: case name -> what `attach` takes; dense is added in front.
        repeats: counted runs of each case.
        warm_up: uncounted runs of each case.
        backend: of the accelerated cases.
        device: where the pipeline is.
        dtype: of the denoiser.
        floors: also run another seed, and random blocks at each case's density.
        options: further keywords of `attach` for the accelerated cases.
    """

    model: str
    settings: Settings
    targets: dict[str, Target]
    repeats: int = 5
    warm_up: int = 1
    backend: str = "auto"
    device: str = "cpu"
    dtype: str = "float32"
    floors: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Last:
    """What a case made when it ran last."""

    run: Run
    report: dict[str, Any]
    checksum: str


def run_latency(pipe: Any, bench: Bench, out: Path, tell: Tell | None = None) -> dict[str, Any]:
    """Return the results of one bench and write results.json, the clips and nothing half.

    Raises:
        InputError: no case, a case called dense, or repeats below 1.
    """
    if not bench.targets or "dense" in bench.targets:
        raise InputError("no case to measure beside dense", remedy="--method gna")
    last: dict[str, _Last] = {}

    def case(name: str, target: Target, **keywords: Any) -> Sample:
        sample, last[name] = _measure(pipe, bench, target, keywords)
        return sample

    work = count_work(pipe, bench.settings, bench.device)
    peak = probe(bench.device, _dtype(bench.dtype))
    extra = {"backend": bench.backend, **bench.options}
    runs = {"dense": lambda: case("dense", "dense")}
    for name, target in bench.targets.items():
        runs[name] = lambda n=name, t=target: case(n, t, **extra)  # type: ignore[misc]
    samples = interleaved(runs, repeats=bench.repeats, warm_up=bench.warm_up, tell=tell)
    share = _share(samples["dense"])
    cases = []
    for name in runs:
        density = last[name].report["density"]
        row = {
            "name": name,
            "method": last[name].report["method"],
            "plan_checksum": last[name].checksum,
            "density": density,
            "sparse_density": last[name].report["sparse_density"],
            "report": last[name].report,
            **summary(samples[name]),
            "speedup": speedup(samples["dense"], samples[name]).to_dict(),
            "flops": work.flops(density),
            "bytes": work.traffic(),
            "limit_ms": peak.limit_ms(work.flops(density), work.traffic()),
            "bound": amdahl(share),
            "bound_at_density": amdahl(share, min(density, 1.0)),
            "fidelity": compare(last["dense"].run.frames, last[name].run.frames).to_dict()
            if name != "dense"
            else None,
            "prompt_score": _prompt_score(bench, last[name].run),
            "clip": _write(out, name, last[name].run),
        }
        cases.append(row)
    floors = _floors(pipe, bench, last) if bench.floors else {}
    results = new_results(
        _run(bench), cases, peak=peak.to_dict(), work=work.to_dict(), floors=floors
    )
    write_text(out / "results.json", json.dumps(results, indent=1, allow_nan=False))
    return results


def count_work(pipe: Any, settings: Settings, device: str = "cpu") -> Work:
    """Return the arithmetic of the stock pipeline for these settings, counted from shapes."""
    timer = PartTimer(parts_of(pipe), device)
    steps = settings.steps
    few = replace(settings, steps=min(steps, COUNTED_STEPS)) if steps else settings
    with timer.running(), WorkCounter(lambda: timer.current) as counter:
        generate(pipe, few)
    scale = steps / few.steps if steps and few.steps else 1.0
    work: Work = counter.work
    work.attention *= scale
    work.attention_bytes *= scale
    for table in (work.other, work.bytes):
        if "transformer" in table:
            table["transformer"] *= scale
    return work


def parts_of(pipe: Any) -> dict[str, list[tuple[Any, str]]]:
    """Return what to time in a pipeline: part -> (object, method) pairs."""
    named = {
        "transformer": [(part, "forward") for part in ("transformer", "transformer_2", "unet")],
        "text encoder": [
            (part, "forward") for part in ("text_encoder", "text_encoder_2", "text_encoder_3")
        ],
        "vae": [("vae", "encode"), ("vae", "decode")],
    }
    return {
        name: [
            (owner, method)
            for part, method in pairs
            if (owner := getattr(pipe, part, None)) is not None
        ]
        for name, pairs in named.items()
    }


def plan_checksum(plan: Plan) -> str:
    """Return a checksum of a plan and its tensors; of its text where it cannot be stored."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = plan.save(Path(folder) / "plan.json")
        except PlanError:  # a user's own method, not in METHODS
            return checksum(repr(plan).encode())
        return checksum(*(file.read_bytes() for file in sorted(path.parent.iterdir())))


def _measure(
    pipe: Any, bench: Bench, target: Target, keywords: dict[str, Any]
) -> tuple[Sample, _Last]:
    timer = PartTimer(parts_of(pipe), bench.device)
    with attach(pipe, target, **keywords) as handle, timer.running(), PeakMemory(bench.device) as m:
        start = time.perf_counter()
        run = generate(pipe, bench.settings)
        spent = timer.milliseconds()
        total = (time.perf_counter() - start) * 1000
        report = handle.report().to_dict()
        digest = plan_checksum(handle.plan)
    attention, choosing = report["attention_ms"], report["choosing_ms"]
    parts = {
        "attention": attention - choosing,
        "choosing": choosing,
        "rest of transformer": max(spent["transformer"] - attention, 0.0),
        "text encoder": spent["text encoder"],
        "vae": spent["vae"],
    }
    parts["other"] = max(total - sum(parts.values()), 0.0)
    return Sample(total, parts, m.bytes), _Last(run, report, digest)


def _floors(pipe: Any, bench: Bench, last: dict[str, _Last]) -> dict[str, Any]:
    """Return the distance of dense to another seed, and to random blocks at each case's density."""
    dense = last["dense"].run.frames
    other = generate(pipe, replace(bench.settings, seed=bench.settings.seed + 1))
    found: dict[str, Any] = {
        "another seed": {
            "seed": bench.settings.seed + 1,
            **compare(dense, other.frames).to_dict(),
        }
    }
    for name in bench.targets:
        report = last[name].report
        share = max(min(report["sparse_density"], 1.0), 1e-3)
        with attach(
            pipe,
            build("random", {"density": share}),
            dense_steps=report["schedule"]["dense_first_steps"],
            dense_last_steps=report["schedule"]["dense_last_steps"],
            dense_layers=report["schedule"]["dense_layers"],
        ) as handle:
            run = generate(pipe, bench.settings)
            density = handle.report().to_dict()["density"]
        found[f"random blocks as {name}"] = {
            "density": density,
            **compare(dense, run.frames).to_dict(),
        }
    return found


def _share(dense: list[Sample]) -> float:
    """Return the share of attention in the dense runs."""
    shares = sorted(sample.parts_ms["attention"] / sample.total_ms for sample in dense)
    return min(shares[len(shares) // 2], 1.0)


def _prompt_score(bench: Bench, run: Run) -> dict[str, Any] | None:
    if bench.model != "demo":
        return None
    return dict(score_clip(run.frames, bench.settings.prompt).to_dict())


def clip_name(case: str) -> str:
    """Return the name of a case as its clip is called, without the ending."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in case)


def _write(out: Path, name: str, run: Run) -> str:
    clip = out / "clips" / f"{clip_name(name)}.mp4"
    return str(write_clip(clip, run.frames, FPS).relative_to(out))


def _run(bench: Bench) -> dict[str, Any]:
    return {
        "model": bench.model,
        **bench.settings.to_dict(),
        "warm_up": bench.warm_up,
        "repeats": bench.repeats,
        "backend": bench.backend,
        "device": bench.device,
        "dtype": bench.dtype,
        "fps": FPS,
    }


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    assert isinstance(found, torch.dtype)
    return found
