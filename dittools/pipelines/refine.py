"""Refining one clip at a size beyond the training one: forecast, upscale, noise, two lanes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.methods.freeswim import FreeSwim, attention_cost
from dittools.patches import Report
from dittools.patches.attach import Target
from dittools.patches.lanes import Lanes, LaneSettings, text_sites
from dittools.patches.refining import Refining
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.output import Frames
from dittools.pipelines.tail import (
    Scouted,
    Step,
    add_noise,
    enlarged,
    fresh_noise,
    scout,
    standing_in,
    tail_of,
    told,
)
from dittools.plans import Plan


@dataclass(frozen=True)
class Refined:
    """What `freeswim` made.

    Attributes:
        frames: [F, height, width, 3] in 0..1.
        native: the clip of the first stage, at the native size.
        lanes: reports of the lanes, by "window" and "full".
        report: sizes, schedule, refreshes, cost, memory, seconds and the lanes, as JSON types.
    """

    frames: Frames
    native: Frames
    lanes: dict[str, Report]
    report: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One request, checked."""

    pipe: Any
    targets: list[Target]
    facts: Refining
    base: Settings  # of the first stage
    wanted: tuple[int, int]
    lanes: LaneSettings
    arguments: dict[str, Any]

    @property
    def padded(self) -> tuple[int, int]:
        """The wanted size in whole multiples of what the pipeline takes."""
        unit = self.facts.multiple(self.pipe)
        height, width = (-(-side // unit) * unit for side in self.wanted)
        return height, width

    def run(
        self,
        clip: Frames | None,
        strength: float,
        shift: float | None,
        generator: torch.Generator | None,
        note: Callable[[str], None],
        progress: Step | None,
    ) -> Refined:
        """Return the clip; see `freeswim`."""
        seconds: dict[str, float] = {}
        base, pipe = self.base, self.pipe
        height, width = self.padded
        target = replace(base, height=height, width=width)
        twin, first = tail_of(pipe.scheduler, base.steps or 0, strength, shift)
        with standing_in(pipe, twin):
            seen = scout(pipe, self.targets, target, self.arguments)
        report = self._forecast(seen, first, strength, shift)
        note(_sentence(report))
        extra = {**self.arguments, **({} if generator is None else {"generator": generator})}
        if clip is None:
            made = generate(pipe, base, told(progress, "native size"), extra)
            clip, seconds["native"] = made.frames, made.seconds
        start = time.perf_counter()
        clean = self._encode(clip)
        extra["latents"] = add_noise(twin, clean, fresh_noise(clean, base.seed, generator))
        seconds["upscale_encode"] = time.perf_counter() - start
        with standing_in(pipe, twin), Lanes(pipe, self.lanes) as lanes:
            made = generate(pipe, target, told(progress, "target size", seen.steps), extra)
            found = lanes.reports()
            report["lanes"] = {name: r.to_dict() for name, r in found.items()}
            report["refresh_steps"] = lanes.refreshes
            report["cache_peak_bytes"] = lanes.cache_peak_bytes
        report["seconds"] = {**seconds, "target": made.seconds}
        frames = made.frames[:, : self.wanted[0], : self.wanted[1]]
        return Refined(frames, clip, found, report)

    def _forecast(
        self, seen: Scouted, first: int, strength: float, shift: float | None
    ) -> dict[str, Any]:
        """Return what is known before anything runs."""
        lanes, window = self.lanes, self.lanes.window
        assert isinstance(window, FreeSwim)
        has_lanes = lanes.full is not None
        grid = TokenGrid(*seen.grid.shape)
        kept = window.mask(grid).density
        cost = attention_cost(grid, window.native, lanes.interval) if has_lanes else kept
        return {
            "format": "dittools-freeswim",
            "mode": "override" if has_lanes else "window",
            "settings": self.base.to_dict(),
            "native": [self.base.height, self.base.width],
            "target": list(self.wanted),
            "padded": list(self.padded),
            "grid": list(grid.shape),
            "native_tokens": list(window.native),
            "window_tokens": list(window.window),
            "attn_temperature": lanes.temperature,
            "strength": strength,
            "flow_shift": shift,
            "first_step": first,
            "steps": seen.steps,
            "cache_interval": lanes.interval if has_lanes else None,
            "window_density": kept,
            "attention_cost": cost if lanes.full in (None, Plan()) else None,
            "cache_bytes": self._cache_bytes(seen) if has_lanes else 0,
            "cache_device": lanes.cache_device,
        }

    def _cache_bytes(self, seen: Scouted) -> int:
        """Return the memory of the text attention of all blocks of the larger denoiser."""
        rows = seen.rows if self.lanes.interval is None else 1
        return max(
            cache_bytes(
                len(text_sites(target)),
                seen.grid.tokens,
                _width(target),
                seen.dtype,
                rows,
            )
            for target in self.targets
        )

    def _encode(self, clip: Frames) -> torch.Tensor:
        """Return the latents of a clip enlarged to the target size, edges repeated up to it."""
        pixels = enlarged(clip, self.wanted, self.padded)
        with torch.no_grad():
            latents = self.facts.encode(self.pipe, pixels.to(self.pipe._execution_device))
        if not bool(latents.isfinite().all()):
            raise InputError("the encoder returned NaN or infinity", remedy="a VAE in float32")
        return latents


def cache_bytes(blocks: int, tokens: int, width: int, dtype: torch.dtype, rows: int = 1) -> int:
    """Return the memory that the text attention of one forward takes.

    Args:
        blocks: cross-attention sites.
        tokens: of the target grid.
        width: heads x head_dim.
        dtype: of the activations.
        rows: of the batch whose text attention is kept.
    """
    return blocks * tokens * width * dtype.itemsize * rows


def _width(target: Target) -> int:
    """Return heads x head_dim of the cross-attention."""
    path = text_sites(target)[0]
    module: Any = target.denoiser.get_submodule(path)
    return int(module.inner_dim)


def _sentence(report: dict[str, Any]) -> str:
    """Say what is about to run and what it costs."""
    target = "x".join(map(str, report["target"]))
    window = "x".join(map(str, report["window_tokens"]))
    parts = [
        f"FreeSwim {report['mode']}: {target} pixels, steps {report['first_step']} to "
        f"{report['first_step'] + report['steps'] - 1}, window {window} of "
        f"{report['grid'][1]}x{report['grid'][2]} tokens"
    ]
    if report["attention_cost"] is not None:
        parts.append(f"self-attention {1 / report['attention_cost']:.2f}x as fast as full")
    if report["cache_bytes"]:
        where = report["cache_device"] or "the model's device"
        parts.append(f"text cache {report['cache_bytes'] / 1e9:.3g} GB on {where}")
    return "; ".join(parts)
