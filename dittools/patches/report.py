"""What an attachment did: densities, calls, time, and why calls stayed dense."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from dittools.patches.recorder import Incident

_SHOWN = 8  # incidents in the text; `incidents` has more


@dataclass(frozen=True)
class LayerReport:
    """One site.

    Attributes:
        site: module path with the component in front.
        layer: index in execution order.
        sparse, dense, passed_through: calls run by a method, run dense though eligible, and left
            alone because they are not the main self- or joint attention.
        density: mean share of query-key pairs computed, over eligible calls; 1 when there are none.
        sparse_density: the same over sparse calls only.
        skipped: forwards of the denoiser in which a cache left the site out.
        error: relative error of its output over the sampled calls, root mean square; None when
            none was sampled.
    """

    site: str
    layer: int
    sparse: int
    dense: int
    passed_through: int
    density: float
    sparse_density: float
    skipped: int = 0
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """What an attachment did since it was made or reset.

    Attributes:
        method: method names of the plan, in the order of its rules.
        preset: where the settings come from.
        family: model family, with the denoiser classes.
        schedule: dense_first_steps, dense_last_steps, dense_layers.
        density: mean share of query-key pairs computed over all eligible calls, dense steps as 1.
        sparse_density: the same over sparse calls only; 1 when there are none.
        calls: sparse, dense and passed_through.
        attention_ms: time in eligible attention calls, dense ones included.
        choosing_ms: part of it that sparse calls spent outside of attention kernels.
        fallbacks: reason to number of calls that ran dense though the plan wanted otherwise.
        fallback_sites: reason to the sites concerned.
        coverage: sites selected, fired, and those that never fired with their processor class.
        backends: backends that ran sparse calls.
        branches, steps, forwards, grids: what was seen.
        skipped: site visits that a cache left out; they enter no count and no density.
        layers: one entry per site.
        notes: remarks on attaching.
        guidance: heads, scale, u and mode of HeadHunter, its extra passes, their rows and time;
            None without it.
        error: how far the output of sparse calls was from dense attention, relative, root mean
            square over the sampled calls; None without a flight recorder or samples.
        errors: the same by site and, within it, by step.
        incidents: where the flight recorder stepped in, the first of them.
        incidents_left_out: how many more there were.
        recorder_ms: time the flight recorder took, in no other number but attention_ms.
    """

    method: str
    preset: str
    family: str
    schedule: dict[str, float | int]
    density: float
    sparse_density: float
    calls: dict[str, int]
    attention_ms: float
    choosing_ms: float
    fallbacks: dict[str, int]
    fallback_sites: dict[str, list[str]]
    coverage: dict[str, Any]
    backends: list[str]
    branches: list[str]
    steps: int
    forwards: int
    grids: list[str]
    notes: list[str] = field(default_factory=list)
    skipped: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    guidance: dict[str, Any] | None = None
    error: float | None = None
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    incidents: list[Incident] = field(default_factory=list)
    incidents_left_out: int = 0
    recorder_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types; a number that is not finite becomes None."""
        found = asdict(self)
        found["errors"] = {
            site: {str(step): error for step, error in by_step.items()}
            for site, by_step in self.errors.items()
        }
        plain: dict[str, Any] = _plain(found)
        return plain

    def __str__(self) -> str:
        """Return a table of two columns."""
        calls = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.calls.items())
        rows = [
            ("method", self.method),
            ("settings", self.preset),
            *((("schedule", f"dense: {words}"),) if (words := _schedule(self.schedule)) else ()),
            ("model", self.family),
            ("density", f"{self.density:.3f} overall, {self.sparse_density:.3f} in sparse calls"),
            ("calls", calls),
            ("attention", f"{self.attention_ms:.1f} ms, {self.choosing_ms:.1f} of it choosing"),
            ("backend", ", ".join(self.backends) or "dense only"),
            ("grids", ", ".join(self.grids) or "none seen yet"),
            ("sites", f"{self.coverage['fired']} of {self.coverage['selected']} fired"),
        ]
        if self.error is not None:
            rows.append(("error", self._error_words(self.error)))
        if self.guidance is not None:
            rows.append(("guidance", _guidance(self.guidance)))
        rows += [
            ("ran dense", f"{count} x {reason} ({_some(self.fallback_sites[reason])})")
            for reason, count in self.fallbacks.items()
        ]
        rows += [("incident", str(incident)) for incident in self.incidents[:_SHOWN]]
        more = len(self.incidents) + self.incidents_left_out - _SHOWN
        if more > 0:
            rows.append(("incident", f"{more} more"))
        if self.skipped:
            rows.append(("skipped", f"{self.skipped} calls, left out by a cache"))
        rows += [("never fired", f"{s}: {why}") for s, why in self.coverage["never_fired"].items()]
        rows += [("note", note) for note in self.notes]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _error_words(self, error: float) -> str:
        sampled = [layer for layer in self.layers if layer.error is not None]
        worst = max(sampled, key=lambda layer: layer.error or 0.0)
        return (
            f"{error:.3f} of dense (rms over sampled calls, worst layer {worst.layer}: "
            f"{worst.error:.3f})"
        )


def _plain(value: Any) -> Any:
    """Return JSON types: tuples as lists, what is not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _schedule(found: dict[str, float | int]) -> str:
    """Say which steps and layers a schedule keeps dense, "" for none."""
    names = {"dense_first_steps": "first", "dense_last_steps": "last", "dense_layers": "first"}
    parts = []
    for name, end in names.items():
        amount, unit = found[name], name.rsplit("_", 1)[1]
        if isinstance(amount, float) and amount:
            parts.append(f"{end} {100 * amount:.3g}% of the {unit}")
        elif amount:
            parts.append(f"{end} {amount} {unit}" if amount > 1 else f"{end} {unit[:-1]}")
    return ", ".join(parts)


def _some(sites: list[str]) -> str:
    """Name the first site and how many more."""
    return sites[0] if len(sites) == 1 else f"{sites[0]} and {len(sites) - 1} more"


def _guidance(found: dict[str, Any]) -> str:
    heads = found["heads"]
    some = ", ".join(heads[:6]) + (f" and {len(heads) - 6} more" if len(heads) > 6 else "")
    return (
        f"scale {found['scale']:g}, u {found['u']:g}, {found['mode']}, heads {some}; "
        f"{found['extra_passes']} extra passes, {found['extra_ms']:.1f} ms"
    )
