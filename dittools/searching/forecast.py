"""Before anything runs: density, attention share, Amdahl's bound and speed-up of a plan."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dittools.errors import InputError
from dittools.grid import TokenGrid
from dittools.methods import Method, build
from dittools.plans import Plan, Rule
from dittools.plans.balance import Balance, plan_balance
from dittools.reading import misfit, read_json
from dittools.searching.cost import DEFAULT_BLOCK, CostTable, flops_table, measure_costs
from dittools.searching.look import Look, groups_of, look
from dittools.searching.pricing import Load, Price, Pricer, Seen, is_fixed
from dittools.searching.request import settings_for
from dittools.searching.scout import named_backend, scout


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
        speedup_as_given: of a whole generation when the losing layers run sparse all the same.
        dense_seconds, seconds: of a generation; None when only FLOPs are known.
        losing: layers left dense because sparse would be slower there.
        unknown: methods whose density only shows in a run, counted at the value in brackets.
        layers: one entry per layer.
        plan: the plan with the losing layers left dense.
        balance: how its work falls on the ranks of a context-parallel group, where asked for.
    """

    basis: str
    tokens: int
    attention_share: float
    bound: float
    density: float
    attention_speedup: float
    speedup: float
    speedup_as_given: float
    dense_seconds: float | None
    seconds: float | None
    losing: tuple[int, ...]
    unknown: tuple[str, ...]
    layers: tuple[LayerForecast, ...]
    plan: Plan = field(repr=False)
    balance: Balance | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types, the plan left out."""
        content = {k: v for k, v in vars(self).items() if k != "plan"}
        content["layers"] = [asdict(layer) for layer in self.layers]
        content["balance"] = None if self.balance is None else asdict(self.balance)
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
            names = ", ".join(map(str, self.losing))
            lines.append(f"left dense         layers {names}: sparse is slower there")
            lines.append(f"the plan as it is  {self.speedup_as_given:.2f}x")
        lines += [f"not known          {text}" for text in self.unknown]
        lines += [] if self.balance is None else [f"ranks              {self.balance}"]
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
    ranks: int = 1,
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
        ranks: of a context-parallel group; above 1 the work of each is shown. Times stay those of
            one device.
    Raises:
        InputError: the config lacks a size, the plan does not fit, or ranks cannot share the heads.
        PlanError: the plan was made for another model.
    """
    chosen = _plan(plan)
    if isinstance(model, (str, Path, Mapping)):
        given = _load_config(model)
        load = load_of_config(given, height, width, frames, steps or 50, vae_scale)
        table = costs or flops_table(load.grid, load.heads, load.head_dim)
        found = predict(load, chosen, table, may_decline=backend == "auto")
        return _balanced(found, load, ranks)
    sizes = {"height": height, "width": width, "frames": frames}
    wanted = settings_for(model, {**sizes, "steps": steps, "guidance": guidance})
    wanted = replace(wanted, prompt="a red circle")
    facts = scout(model, wanted)
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
    runner = named_backend(model, backend)
    seen: Look | None = None
    if not all(is_fixed(rule.method) or rule.method.name == "dense" for rule in chosen.rules):
        seen = look(model, wanted, chosen, load, runner)
    table = costs or measure_costs(
        load.grid,
        load.heads,
        load.head_dim,
        backend=runner,
        device=torch.device(getattr(model, "device", "cpu")),
        dtype=facts.dtype,
        blocks=_blocks(chosen),
        groups=groups_of(chosen, load),
        sample=None if seen is None else seen.sample,
    )
    found = predict(load, chosen, table, may_decline=backend == "auto", seen=seen)
    return _balanced(found, load, ranks)


def predict(
    load: Load,
    plan: Plan,
    costs: CostTable,
    *,
    may_decline: bool = False,
    seen: Seen | None = None,
) -> Forecast:
    """Return the forecast of a plan from facts and kernel times alone.

    Args:
        load: what the model does.
        plan: to judge.
        costs: kernel times.
        may_decline: the backend runs dense by itself where that is faster, as "auto" does.
        seen: what methods kept in a short run of the model.
    """
    pricer = Pricer(load, plan, costs, may_decline, seen)
    found = [_judged(layer, pricer.layer(layer)) for layer in range(load.layers)]
    losing = tuple(n.layer for n in found if n.is_losing)
    kept = [_left_dense(n) if n.is_losing else n for n in found]
    time, given = (_mean_time(layers) for layers in (kept, found))
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
        1 / (1 - share + share * given),
        load.seconds or None,
        load.seconds / speedup if load.seconds else None,
        losing,
        tuple(pricer.unknown),
        tuple(found),
        without_layers(plan, losing, load.layers, load.paths),
    )


def _balanced(found: Forecast, load: Load, ranks: int) -> Forecast:
    """Return the forecast with the work of every rank."""
    if ranks == 1:
        return found
    balance = plan_balance(
        found.plan,
        load.grid,
        layers=load.layers,
        heads=load.heads,
        steps=load.steps,
        ranks=ranks,
        paths=load.paths,
    )
    return replace(found, balance=balance)


def _judged(layer: int, price: Price) -> LayerForecast:
    """Return the forecast of one layer; one that computes everything cannot lose."""
    if price.density > 0.9999:
        return LayerForecast(layer, price.density, price.computed, 1.0, False)
    speedup = 1 / max(price.time, 1e-6)
    return LayerForecast(layer, price.density, price.computed, speedup, price.time >= 1)


def _mean_time(layers: list[LayerForecast]) -> float:
    return sum(1 / layer.attention_speedup for layer in layers) / len(layers)


def _left_dense(layer: LayerForecast) -> LayerForecast:
    return replace(layer, density=1.0, computed=1.0, attention_speedup=1.0)


def without_layers(
    plan: Plan, layers: tuple[int, ...], count: int, paths: tuple[str, ...] = ()
) -> Plan:
    """Return the plan with some layers left dense.

    Args:
        plan: whose rules may name layers by number or by module path.
        layers: to leave dense.
        count: layers of the model.
        paths: module path of every layer, where known.
    """
    if not layers:
        return plan
    rules: list[Rule] = []
    for rule in plan.rules:
        covered = [n for n in range(count) if rule.covers_layer(n, paths[n] if paths else "")]
        kept = tuple(n for n in covered if n not in layers)
        if len(kept) == len(covered):
            rules.append(rule)
        elif kept:
            rules.append(replace(rule, layers=kept))
    return replace(plan, rules=tuple(rules))


def _plan(plan: Plan | Method | str | Path) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Path) or (isinstance(plan, str) and plan.endswith(".json")):
        return Plan.load(plan)
    return Plan.of(build(plan) if isinstance(plan, str) else plan)


def _blocks(plan: Plan) -> tuple[int, ...]:
    sizes = {int(getattr(rule.method, "block_size", DEFAULT_BLOCK)) for rule in plan.rules}
    return tuple(sorted(sizes or {DEFAULT_BLOCK}))


def _load_config(model: "str | Path | Mapping[str, Any]") -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the model config {path}: {error}", remedy="the denoiser's config.json"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no model config", expected="a JSON object")
    return content


_CONFIG = {
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "num_layers"), int),
    **dict.fromkeys(("num_single_layers?", "ffn_dim?"), (int, None)),
    "patch_size?": (int, [int], tuple),
    "*": Any,
}


def _not_positive(config: Mapping[str, Any]) -> str:
    """Return the first size of a config that is not above 0, "" where all are."""
    patch = config.get("patch_size", 1)
    sides = list(patch) if isinstance(patch, (list, tuple)) else [patch] * 3
    if len(sides) != 3 or min(sides) < 1:
        return f"patch_size {patch}"
    names = ("num_attention_heads", "attention_head_dim", "num_layers")
    return next((f"{name} {config[name]}" for name in names if config[name] < 1), "")


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
    if wrong := misfit(dict(config), _CONFIG, "the config") or _not_positive(config):
        raise InputError("the model config is not usable", got=wrong)
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
