"""Before anything runs: density, attention share, Amdahl's bound and speed-up of a plan."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.methods import GridMethod, Method, build
from dittools.plans import Plan, Rule
from dittools.searching.candidates import phrase
from dittools.searching.cost import CostTable, flops_table, measure_costs
from dittools.searching.request import settings_for
from dittools.searching.scout import named_backend, scout

_DEFAULT_BLOCK = 128  # tokens, where a method does not say


@dataclass(frozen=True)
class Load:
    """What a model does in one generation.

    Attributes:
        grid: geometry of the main attention.
        layers, heads, head_dim, steps: of the run.
        attention_share: part of the time (or FLOPs) in attention a plan can act on.
        seconds: of a dense generation; 0 when only FLOPs are known.
        paths: module path of every layer, "" where not known.
    """

    grid: TokenGrid
    layers: int
    heads: int
    head_dim: int
    steps: int
    attention_share: float
    seconds: float = 0.0
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerForecast:
    """One layer over the whole run.

    Attributes:
        density: mean share of pairs, dense steps counted as 1.
        computed: mean share of blocks visited.
        attention_speedup: of this layer's attention.
        is_losing: the plan would make it slower, so it is left dense.
    """

    layer: int
    density: float
    computed: float
    attention_speedup: float
    is_losing: bool


@dataclass(frozen=True)
class Forecast:
    """What a plan promises.

    Attributes:
        basis: "measured" kernel times, or "flops".
        tokens: of one sequence.
        attention_share, bound: part of the run a plan can act on, and Amdahl's 1 / (1 - share).
        density: over layers and steps, losing layers dense.
        attention_speedup, speedup: of attention, and of a whole generation.
        dense_seconds, seconds: of a generation; None when only FLOPs are known.
        losing: layers left dense because sparse would be slower there.
        unknown: methods whose density only shows in a run, counted at the value in brackets.
        layers: one entry per layer.
        plan: the plan with the losing layers left dense.
    """

    basis: str
    tokens: int
    attention_share: float
    bound: float
    density: float
    attention_speedup: float
    speedup: float
    dense_seconds: float | None
    seconds: float | None
    losing: tuple[int, ...]
    unknown: tuple[str, ...]
    layers: tuple[LayerForecast, ...]
    plan: Plan = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types, the plan left out."""
        content = {k: v for k, v in vars(self).items() if k != "plan"}
        content["layers"] = [asdict(layer) for layer in self.layers]
        return json.loads(json.dumps(content))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        """Return a few lines and one per layer."""
        lines = [
            f"basis              {self.basis}",
            f"tokens             {self.tokens}",
            f"density            {self.density:.3f}",
            f"attention share    {self.attention_share:.1%}, at best {self.bound:.2f}x",
            f"attention          {self.attention_speedup:.2f}x",
            f"whole generation   {self.speedup:.2f}x{_seconds(self)}",
        ]
        if self.losing:
            lines.append(f"left dense         layers {', '.join(map(str, self.losing))}: slower")
        lines += [f"not known          {text}" for text in self.unknown]
        lines += [
            f"layer {n.layer:<3} density {n.density:.3f}, attention {n.attention_speedup:.2f}x"
            for n in self.layers
        ]
        return "\n".join(lines)


def _seconds(found: Forecast) -> str:
    if found.dense_seconds is None or found.seconds is None:
        return ""
    return f", {found.dense_seconds:.2f} s -> {found.seconds:.2f} s"


def forecast(
    model: Any,
    plan: Plan | Method | str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    backend: str = "auto",
    costs: CostTable | None = None,
    vae_scale: tuple[int, int, int] = (4, 8, 8),
) -> Forecast:
    """Return what a plan promises on a model at one size, layer by layer.

    For a pipeline the share of attention is read off three dense steps and kernels are timed on its
    device; for a config nothing runs and time is taken to follow the FLOPs. Layers where sparse
    would be slower are named and left dense.

    Args:
        model: a pipeline, a denoiser config (mapping or path of config.json).
        plan: a plan, a plan file, a method, or a method's name.
        height, width: pixels.
        frames: of the clip, 1 for an image.
        steps: denoising steps.
        guidance: guidance scale; changes how many forwards a step takes.
        backend: that will run the plan.
        costs: kernel times of an earlier search, in place of timing again.
        vae_scale: pixels per latent in time, height and width; for configs.
    Raises:
        InputError: the config lacks a size, or the plan does not fit.
        PlanError: the plan was made for another model.
    """
    chosen = _plan(plan)
    if isinstance(model, (str, Path, Mapping)):
        given = _load_config(model)
        load = load_of_config(given, height, width, frames, steps or 50, vae_scale)
        table = costs or flops_table(load.grid, load.heads, load.head_dim)
    else:
        sizes = {"height": height, "width": width, "frames": frames}
        wanted = settings_for(model, {**sizes, "steps": steps, "guidance": guidance})
        facts = scout(model, replace(wanted, prompt="a red circle"))
        chosen.check(facts.model)
        load = Load(
            facts.grid,
            facts.model.layers,
            facts.model.heads,
            facts.model.head_dim,
            facts.steps,
            facts.attention_share,
            facts.seconds,
            facts.model.paths,
        )
        table = costs or measure_costs(
            load.grid,
            load.heads,
            load.head_dim,
            backend=named_backend(model, backend),
            device=torch.device(getattr(model, "device", "cpu")),
            dtype=facts.dtype,
            blocks=_blocks(chosen),
            choosing=_choosers(chosen),
        )
    return predict(load, chosen, table, may_decline=backend == "auto")


def predict(load: Load, plan: Plan, costs: CostTable, *, may_decline: bool = False) -> Forecast:
    """Return the forecast of a plan from facts and kernel times alone.

    Args:
        load: what the model does.
        plan: to judge.
        costs: kernel times.
        may_decline: the backend runs dense by itself where that is faster, as "auto" does.
    """
    pricer = _Pricer(load, plan, costs, may_decline)
    found = [pricer.layer(layer) for layer in range(load.layers)]
    losing = tuple(n.layer for n in found if n.is_losing)
    kept = [_left_dense(n) if n.is_losing else n for n in found]
    time = sum(1 / n.attention_speedup if n.attention_speedup else 0.0 for n in kept) / len(kept)
    share = load.attention_share
    speedup = 1 / (1 - share + share * time)
    return Forecast(
        costs.basis,
        load.grid.total,
        share,
        1 / max(1 - share, 1e-9),
        sum(n.density for n in kept) / len(kept),
        1 / max(time, 1e-9),
        speedup,
        load.seconds or None,
        load.seconds / speedup if load.seconds else None,
        losing,
        tuple(pricer.unknown),
        tuple(found),
        without_layers(plan, losing, load.layers),
    )


def _left_dense(layer: LayerForecast) -> LayerForecast:
    return replace(layer, density=1.0, computed=1.0, attention_speedup=1.0)


class _Pricer:
    """Density and time of every layer; masks are made once per method."""

    def __init__(self, load: Load, plan: Plan, costs: CostTable, may_decline: bool) -> None:
        self.load, self.plan, self.costs, self.may_decline = load, plan, costs, may_decline
        self.unknown: dict[str, None] = {}
        self._known: dict[int, tuple[Method, tuple[float, float, float]]] = {}

    def layer(self, layer: int) -> LayerForecast:
        load = self.load
        path = load.paths[layer] if layer < len(load.paths) else ""
        density = computed = time = 0.0
        for step in range(load.steps):
            sides = ("cond", "uncond") if self.plan.needs_branch else ("",)
            found = [
                self.plan.rules_for(layer, path, step, load.steps, load.heads, side)
                for side in sides
            ]
            parts = load.steps * len(sides)
            time += sum(len(rules) > 1 for rules in found) * self.costs.split_ratio / parts
            for heads, method in (rule for rules in found for rule in rules):
                share = len(heads) / load.heads / parts
                values = self.price(method)
                density += share * values[0]
                computed += share * values[1]
                time += share * values[2]
        if density > 0.9999:
            return LayerForecast(layer, density, computed, 1.0, False)
        return LayerForecast(layer, density, computed, 1 / max(time, 1e-6), time >= 1)

    def price(self, method: Method) -> tuple[float, float, float]:
        """Return density, computed share and time share of one method."""
        if id(method) not in self._known:
            self._known[id(method)] = (method, self._price(method))
        return self._known[id(method)][1]

    def _price(self, method: Method) -> tuple[float, float, float]:
        mode = getattr(method, "mode", "")
        if method.name == "dense" or mode == "full":
            return 1.0, 1.0, 1.0
        if mode == "skip":
            return 0.0, 0.0, 0.0
        block = int(getattr(method, "block_size", _DEFAULT_BLOCK))
        if isinstance(method, GridMethod) and mode != "auto":
            mask = method.mask(self.load.grid)
            density, computed = mask.density, mask.computed
        else:
            density, computed = self._chosen(method)
        time = self.costs.ratio(computed, block) if density < 1 else 1.0
        time += self.costs.choosing(method.name)
        return density, computed, min(time, 1.0) if self.may_decline else time

    def _chosen(self, method: Method) -> tuple[float, float]:
        """Return density and computed share of a method that chooses in the run: what the search
        measured, or the density it is asked for.
        """
        known = self.plan.measured.get("densities", {}).get(phrase(method))
        if known is not None:
            return float(known[0]), float(known[1])
        nominal = getattr(method, "density", None)
        density = float(nominal) if isinstance(nominal, float) else 1.0
        self.unknown[f"{method.name} chooses in the run ({density:.2f} assumed)"] = None
        return density, density


def without_layers(plan: Plan, layers: tuple[int, ...], count: int) -> Plan:
    """Return the plan with some layers left dense."""
    if not layers:
        return plan
    rules: list[Rule] = []
    for rule in plan.rules:
        if rule.layers == "all":
            kept: tuple[int | str, ...] = tuple(n for n in range(count) if n not in layers)
        else:
            kept = tuple(n for n in rule.layers if n not in layers)
        if kept:
            rules.append(replace(rule, layers=kept))
    return replace(plan, rules=tuple(rules))


def _plan(plan: Plan | Method | str | Path) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Path) or (isinstance(plan, str) and plan.endswith(".json")):
        return Plan.load(plan)
    return Plan.of(build(plan) if isinstance(plan, str) else plan)


def _choosers(plan: Plan) -> list[Method]:
    """Return one method of each name that looks at query and key."""
    methods = [rule.method for rule in plan.rules]
    found = {m.name: m for m in methods if m.name != "dense" and not isinstance(m, GridMethod)}
    return list(found.values())


def _blocks(plan: Plan) -> tuple[int, ...]:
    sizes = {int(getattr(rule.method, "block_size", _DEFAULT_BLOCK)) for rule in plan.rules}
    return tuple(sorted(sizes or {_DEFAULT_BLOCK}))


def _load_config(model: "str | Path | Mapping[str, Any]") -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the model config {path}: {error}", remedy="the denoiser's config.json"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no model config", expected="a JSON object")
    return content


def load_of_config(
    config: Mapping[str, Any],
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int,
    vae_scale: tuple[int, int, int],
) -> Load:
    """Return the load of a denoiser from its config: multiply-adds of attention and of the rest.

    A block counts N * (4 projections of d x d, 2 more and their text side for cross-attention, and
    2 of d x ffn), attention 2 * N^2 * d; d = heads * head_dim.

    Raises:
        InputError: a size is missing.
    """
    needed = ("num_attention_heads", "attention_head_dim", "num_layers")
    missing = [name for name in needed if not isinstance(config.get(name), int)]
    if missing or height is None or width is None:
        lacking = missing or [n for n, v in (("height", height), ("width", width)) if v is None]
        raise InputError(
            "the forecast lacks a size", expected="config and size", got=f"no {', '.join(lacking)}"
        )
    patch = config.get("patch_size", 1)
    sides = tuple(patch) if isinstance(patch, (list, tuple)) else (1, int(patch), int(patch))
    latent = ((frames or 1) - 1) // vae_scale[0] + 1
    grid = TokenGrid(
        max(latent // sides[0], 1),
        max(height // vae_scale[1] // sides[1], 1),
        max(width // vae_scale[2] // sides[2], 1),
    )
    heads, width_ = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    channels = heads * width_
    layers = int(config["num_layers"]) + int(config.get("num_single_layers") or 0)
    inner = int(config.get("ffn_dim") or 4 * channels)
    projections = 4 * channels**2 + (2 * channels**2 if "text_dim" in config else 0)
    rest = grid.total * (projections + 2 * channels * inner)
    attention = 2 * grid.total**2 * channels
    return Load(grid, layers, heads, width_, steps, attention / (attention + rest))
