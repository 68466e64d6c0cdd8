"""`dittools.calibrate`: from prompts and a density to a PAROAttention plan with static masks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dittools.errors import InputError
from dittools.methods.paro import NAMES, PARO
from dittools.methods.paro_calibrate import (
    METRICS,
    BlockMasses,
    OrderScores,
    best_orders,
    bins_of,
    tables_of,
)
from dittools.methods.paro_tables import ParoTables
from dittools.metrics.fidelity import compare
from dittools.patches import attach, detach
from dittools.patches.attach import find_targets
from dittools.pipelines.generate import Settings, generate
from dittools.pipelines.output import check_writable
from dittools.plans import Plan, Rule
from dittools.plans.plan import Schedule
from dittools.searching.request import Budget, Request, check_prompts, settings_for
from dittools.searching.scout import Facts, named_backend, scout
from dittools.searching.store import Report, Result, Store, fingerprint, weights_digest

_PROMPTS = 2  # maps correlate at 0.99 and more over prompts
_STEPS_FOR_ORDERS = 4
_STEPS_PER_MASK = 4
_HELD = 3 * 4 * 2**24  # bytes of weights a map is streamed in


@dataclass(frozen=True)
class Choices:
    """How masks are made.

    Attributes:
        target_density: share of query-key pairs over the whole run, dense steps counted as 1.
        orders: "recall" or "paper", the score that orders are chosen by.
        masks: masks over the run; 0 is the paper's sharing.
        rows: queries per block that maps are judged by, 0 for all.
        per_head: every head keeps the same share.
        block_size: tokens.
        dense_steps: first steps that stay dense.
        dense_layers: first layers that stay dense.
        held_out: prompts the plan is verified on, 0 for none.
    """

    target_density: float
    orders: str = "recall"
    masks: int = 0
    rows: int = 16
    per_head: bool = False
    block_size: int = 64
    dense_steps: float | int = 0
    dense_layers: int = 0
    held_out: int = 2

    def __post_init__(self) -> None:
        """Refuse what calibrates nothing."""
        if self.orders not in ("recall", "paper"):
            raise InputError("unknown order score", expected="recall or paper", got=self.orders)
        for name, least in (("masks", 0), ("rows", 0), ("block_size", 8), ("held_out", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} is not usable",
                    expected=f"at least {least}",
                    got=str(getattr(self, name)),
                )


@dataclass(frozen=True)
class Cost:
    """What a calibration takes.

    Attributes:
        generations: complete ones, by what they are for.
        memory_bytes: beside the model, at the peak.
        mask_bytes: of the packed masks, in the plan's side file.
        disk_bytes: of the work folder.
        masks: masks per layer and head over the run.
        seconds: of the generations, measuring not counted.
    """

    generations: dict[str, int]
    memory_bytes: int
    mask_bytes: int
    disk_bytes: int
    masks: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """Return three lines."""
        parts = ", ".join(f"{count} {name}" for name, count in self.generations.items())
        mib = 2.0**20
        return "\n".join(
            [
                f"generations {sum(self.generations.values())} ({parts}), "
                f"{self.seconds / 60:.1f} minutes without the measuring",
                f"memory      at most {self.memory_bytes / mib:.1f} MiB beside the model, "
                f"{self.disk_bytes / mib:.1f} MiB on disk",
                f"masks       {self.masks} per layer and head, {self.mask_bytes / mib:.3f} MiB",
            ]
        )


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | str | Path,
    choices: Choices,
    *,
    backend: str = "auto",
    out: str | Path | None = None,
    work: str | Path | None = None,
    progress: Report | None = None,
    **settings: Any,
) -> Plan:
    """Return the PAROAttention plan whose static masks have a density on this model.

    Every second prompt is held out; `plan.measured` has the PSNR against dense on these. The same
    inputs give the same plan, byte for byte.

    Args:
        pipe: a stock pipeline; what is attached to it is taken off.
        prompts: texts, or the path of a UTF-8 file with one a line.
        choices: density and how masks are made.
        backend: a named attention backend, or "auto" for the device's.
        out: plan file, masks in a side file next to it.
        work: folder of finished generations, so that a killed calibration goes on; by default
            beside `out`, and nowhere without `out`.
        progress: called with (what, units done, units in all).
        **settings: height, width, frames, steps, guidance, negative_prompt, seed.
    Raises:
        InputError: wrong prompts or options, or a density that text and diagonal alone exceed.
        AttachError: nothing in the pipeline can be accelerated.
    """
    request = request_of(pipe, prompts, choices, settings)
    target = None if out is None else Path(out)
    if target is not None:
        check_writable(target.parent)
        work = work or target.parent / f".{target.stem}.calibrate"
    detach(pipe)
    facts = scout(pipe, request.calibration[0])
    _masked_density(facts, choices)  # refused before any work
    weights = weights_digest(find_targets(pipe)[0].denoiser)
    store = Store(None if work is None else Path(work), progress)
    run = _Run(pipe, request, choices, facts, store, named_backend(pipe, backend), weights)
    orders, recall = run.choose_orders()
    tables = run.make_tables(orders)
    plan = _plan(tables, request, choices, facts, recall)
    if choices.held_out:
        plan = replace(plan, measured=run.verify(plan))
    if target is not None:
        plan.save(target)
    return plan


def request_of(
    pipe: Any, prompts: Sequence[str] | str | Path, choices: Choices, settings: dict[str, Any]
) -> Request:
    """Return the checked generations of a calibration."""
    budget = Budget(calibration=_PROMPTS, held_out=max(choices.held_out, 1))
    texts, sizes = check_prompts(prompts), settings_for(pipe, settings)
    if not 0 < choices.target_density <= 1:
        raise InputError(
            "the target density is not usable",
            expected="above 0, at most 1",
            got=f"{choices.target_density:g}",
        )
    return Request(texts, sizes, "density", choices.target_density, ("paro",), budget=budget)


def cost(pipe: Any, request: Request, choices: Choices) -> Cost:
    """Return what a calibration takes; runs three denoising steps to find out."""
    return cost_of(request, choices, scout(pipe, request.calibration[0]))


def cost_of(request: Request, choices: Choices, facts: Facts) -> Cost:
    """Return what a calibration takes on a model whose facts are known."""
    blocks = -(-facts.grid.tokens // choices.block_size)
    masks = max(bins_of(facts.steps, choices.masks)) + 1
    sites = masks * facts.model.layers * facts.model.heads
    prompts, held = len(request.calibration), len(request.held_out) if choices.held_out else 0
    generations = {"for orders": prompts, "for masks": prompts, "to verify": 2 * held}
    return Cost(
        generations,
        # two prompts' sums, the sorted-out part and its copy, then boolean masks; one map streamed
        sites * blocks**2 * (2 * 4 + 4 + 3) + _HELD,
        sites * -(-(blocks**2) // 8),
        prompts * sites * blocks**2 * 4,
        masks,
        sum(generations.values()) * facts.seconds,
    )


def _masked_density(facts: Facts, choices: Choices) -> float:
    """Return the density sparse calls must have for the run to have the target."""
    schedule = Schedule(choices.dense_steps, 0, choices.dense_layers)
    places = [(layer, step) for layer in range(facts.model.layers) for step in range(facts.steps)]
    dense = sum(schedule.is_dense(*place, facts.steps) for place in places) / len(places)
    if dense >= 1 or choices.target_density <= dense:
        raise InputError(
            "dense steps and layers leave nothing to the masks",
            expected=f"a target above {dense:.4f}, their share of the run",
            got=f"{choices.target_density:g}",
        )
    return (choices.target_density - dense) / (1 - dense)


def _plan(
    tables: ParoTables, request: Request, choices: Choices, facts: Facts, recall: float
) -> Plan:
    method = PARO(choices.target_density, block_size=choices.block_size, tables=tables)
    counts = tables.orders.flatten().bincount(minlength=len(NAMES)).tolist()
    provenance = {
        "made by": "dittools calibrate",
        "choices": asdict(choices),
        "prompts": [use.prompt for use in request.calibration],
        "settings": request.settings.to_dict(),
        "orders": dict(zip(NAMES, counts, strict=True)),
        "recall": round(recall, 6),
        "mask_bytes": tables.packed.numel(),
    }
    schedule = Schedule(choices.dense_steps, 0, choices.dense_layers)
    return Plan((Rule(method),), schedule, facts.model, provenance=provenance)


@dataclass
class _Run:
    """One calibration: two passes over the prompts, then the held-out generations."""

    pipe: Any
    request: Request
    choices: Choices
    facts: Facts
    store: Store
    backend: str
    weights: str

    @property
    def _rows(self) -> int | None:
        return self.choices.rows or None

    def _key(self, what: str, use: Settings, *more: Any) -> str:
        fixed = (self.weights, self.choices.block_size, self.choices.rows)
        return f"{what} {fingerprint(use.to_dict(), fixed, *more)}"

    def choose_orders(self) -> tuple[torch.Tensor, float]:
        """Return int64 [layers, heads] and the mean recall of the chosen orders."""
        steps = _spread(list(range(self.facts.steps)), _STEPS_FOR_ORDERS)

        def look(use: Settings) -> Result:
            probe = OrderScores(
                self.choices.target_density, steps, self.choices.block_size, self._rows
            )
            self._generate(probe, use)
            layers = range(self.facts.model.layers)
            missing = [layer for layer in layers if layer not in probe.sums]
            if missing:
                raise InputError("the calibration did not see every layer", got=str(missing))
            return {
                "scores": torch.stack([probe.sums[layer] for layer in layers]),
                "maps": torch.tensor([probe.maps[layer] for layer in layers]),
            }

        density = self.choices.target_density
        found = self._each("choosing orders", look, ("orders", density, steps))
        maps = torch.stack([f["maps"] for f in found]).sum(0)
        scores = torch.stack([f["scores"] for f in found]).sum(0) / maps[:, None, None, None]
        orders = best_orders(scores, self.choices.orders)
        recall = scores[:, METRICS.index("recall")].gather(1, orders[:, None])
        return orders, float(recall.mean())

    def make_tables(self, orders: torch.Tensor) -> ParoTables:
        """Return the tables of the target density in given orders."""
        facts, choices = self.facts, self.choices
        bins = bins_of(facts.steps, choices.masks)
        steps: list[int] = []
        for bin_ in range(max(bins) + 1):
            members = [s for s, b in enumerate(bins) if b == bin_]
            steps += _spread(members, _STEPS_PER_MASK)
        totals: list[torch.Tensor] = []

        def look(use: Settings) -> Result:
            probe = BlockMasses(facts.grid, orders, bins, steps, choices.block_size, self._rows)
            self._generate(probe, use)
            return {"mass": probe.mass, "maps": probe.maps}

        for part in self._each("adding up masses", look, ("masses", orders.tolist(), bins, steps)):
            if totals:
                totals[0] += part["mass"]
                totals[1] += part["maps"]
            else:
                totals = [part["mass"].clone(), part["maps"].clone()]
        mass = totals[0] / totals[1].clamp(min=1)[:, :, None, None, None]
        schedule = Schedule(choices.dense_steps, 0, choices.dense_layers)
        weights = torch.zeros(totals[1].shape, dtype=torch.float64)
        for step, bin_ in enumerate(bins):
            for layer in range(facts.model.layers):
                weights[bin_, layer] += not schedule.is_dense(layer, step, facts.steps)
        density = _masked_density(facts, choices)
        size, per_head = choices.block_size, choices.per_head
        return tables_of(facts.grid, size, orders, mass, bins, density, weights, per_head)

    def verify(self, plan: Plan) -> dict[str, Any]:
        """Return PSNR and density of the plan over the held-out prompts."""
        rows = []
        for number, use in enumerate(self.request.held_out, start=1):
            dense = generate(self.pipe, use).frames
            with attach(self.pipe, plan, backend=self.backend, recorder=False) as handle:
                frames = generate(self.pipe, use).frames
                density = handle.report().density
            rows.append((compare(dense, frames).psnr_db, density))
            self.store.tell("verifying", number, len(self.request.held_out))
        each = [round(float(psnr), 4) for psnr, _ in rows]
        return {
            "held_out": [use.prompt for use in self.request.held_out],
            "psnr_db": round(sum(each) / len(each), 4),
            "psnr_db_each": each,
            "density": round(sum(density for _, density in rows) / len(rows), 6),
        }

    def _each(self, what: str, look: Any, key: tuple[Any, ...]) -> list[Result]:
        found = []
        for number, use in enumerate(self.request.calibration, start=1):
            name = self._key(what, use, *key)
            found.append(self.store.once(name, lambda use=use: look(use)))  # type: ignore[misc]
            self.store.forget(name)
            self.store.tell(what, number, len(self.request.calibration))
        return found

    def _generate(self, probe: Any, use: Settings) -> None:
        with attach(self.pipe, Plan((Rule(probe),)), backend=self.backend, recorder=False):
            generate(self.pipe, use)


def _spread(steps: list[int], count: int) -> list[int]:
    """Return at most `count` steps, amid equal parts."""
    count = min(count, len(steps))
    return [steps[(2 * i + 1) * len(steps) // (2 * count)] for i in range(count)]
