"""What happens at an attention call: place it, ask the plan, run the method, note what was done."""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.errors import DitToolsError, UnsupportedCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.patches.adapters import Family, Layout
from dittools.patches.masks import KeyMask, key_mask
from dittools.patches.meter import DENSE_IS_FASTER, Meter
from dittools.patches.sites import SeamCall, Site
from dittools.patches.steps import StepClock
from dittools.patches.timing import Stopwatch
from dittools.plans import Plan
from dittools.plans.plan import HeadRule

KEEPS_ALL = "the method keeps every pair at this size"
NOT_FINITE = "query, key or value holds NaN or infinity"
UNKNOWN_LENGTH = (
    "the length of the run is unknown, so shares of it and last steps cannot be told: "
    "attach to the pipeline, or count dense steps from the first in whole numbers"
)


@dataclass
class Tally:
    """What one site did so far; `pairs` and `sparse_pairs` add up densities of calls."""

    sparse: int = 0
    dense: int = 0
    passed: int = 0
    sparse_density: float | torch.Tensor = 0.0
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Moment:
    """One forward of a denoiser.

    Attributes:
        layout: where its tokens sit; None when that could not be found.
        problem: why not.
        step, steps, branch: where in the run it stands.
        ordinals: main calls so far per site.
        masks: key masks worked out so far, by id of the mask (kept alive beside it).
    """

    layout: Layout | None
    problem: str
    step: int
    steps: int
    branch: str
    ordinals: Counter[str] = field(default_factory=Counter)
    masks: dict[int, tuple[torch.Tensor, KeyMask]] = field(default_factory=dict)


class Runtime:
    """State of one attachment, shared by its denoisers and by copies of them."""

    def __init__(self, plan: Plan, backend: Backend, pipe: Any, check_finite: bool) -> None:
        """Start with nothing counted; `pipe` holds the scheduler, None for a bare denoiser."""
        self.plan = plan
        self.backend = backend
        self.check_finite = check_finite
        self.clock = StepClock(pipe)
        self.memory: dict[tuple[str, str, int], tuple[Any, dict[str, Any]]] = {}
        self._rules: dict[tuple[str, int, int, int], list[HeadRule]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was counted and timed; method memory stays."""
        self.tallies: dict[str, Tally] = {}
        self.attention = Stopwatch()
        self.sparse_calls = Stopwatch()
        self.backend_work = Stopwatch()
        self.used: set[str] = set()
        self.branches: set[str] = set()
        self.steps_seen: set[int] = set()
        self.forwards = 0
        self.grids: set[TokenGrid] = set()

    def tally(self, site: Site) -> Tally:
        """Return the counts of a site."""
        return self.tallies.setdefault(site.name, Tally())

    def rules(self, site: Site, step: int, steps: int, heads: int) -> list[HeadRule]:
        """Return what the plan says, worked out once per site and step."""
        key = (site.name, step, steps, heads)
        if key not in self._rules:
            if len(self._rules) > 65536:
                self._rules.clear()
            self._rules[key] = self.plan.rules_for(site.layer, site.name, step, steps, heads)
        return self._rules[key]

    def recall(self, key: tuple[str, str, int], shapes: Any) -> dict[str, Any]:
        """Return the memory of (site, branch, ordinal), empty when shapes changed."""
        known, memory = self.memory.get(key, (None, {}))
        if known != shapes:
            memory = {}
            self.memory[key] = (shapes, memory)
        return memory


class Root:
    """One attached denoiser: follows its forwards and answers its sites."""

    def __init__(self, component: str, family: Family, runtime: Runtime) -> None:
        """Start without sites; `install` adds them."""
        self.component, self.family, self.runtime = component, family, runtime
        self.sites: list[Site] = []
        self.branch_name: Callable[[], str | None] = lambda: None
        self.moment: Moment | None = None
        self._unnamed: tuple[int, int] = (-1, 0)  # step, unnamed forwards seen in it
        self._signatures: weakref.WeakKeyDictionary[type, inspect.Signature] = (
            weakref.WeakKeyDictionary()
        )

    def begin(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Take note of a forward that is about to run."""
        runtime = self.runtime
        arguments = self._bind(denoiser, args, kwargs)
        place = runtime.clock.observe(arguments.get(self.family.timestep))
        if place.is_new_run:
            runtime.memory.clear()
            self._unnamed = (-1, 0)
        layout, problem = None, ""
        try:
            layout = self.family.layout(arguments, denoiser)
        except DitToolsError as error:
            problem = f"the token grid is not known: {error}"
        branch = self._branch(place.step)
        runtime.forwards += 1
        runtime.branches.add(branch)
        runtime.steps_seen.add(place.step)
        self.moment = Moment(layout, problem, place.step, place.steps, branch)

    def _bind(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        kind = type(denoiser)
        if kind not in self._signatures:
            self._signatures[kind] = inspect.signature(kind.forward)
        return self._signatures[kind].bind_partial(denoiser, *args, **kwargs).arguments

    def _branch(self, step: int) -> str:
        """Return the name diffusers gives the forward, else one by its order within the step."""
        name = self.branch_name()
        if name is not None:
            return name
        at, count = self._unnamed
        count = count if at == step else 0
        self._unnamed = (step, count + 1)
        if count < len(self.family.branches):
            return self.family.branches[count]
        return "" if count == 0 else f"call {count}"

    def attend(self, site: Site, call: SeamCall) -> torch.Tensor:
        """Return the attention of one call, in the layout it came in."""
        runtime, moment = self.runtime, self.moment
        tally = runtime.tally(site)
        axis = 2 if call.heads_first else 1
        tokens = call.query.shape[axis]
        if moment is None or call.query.dim() != 4 or tokens != call.key.shape[axis]:
            tally.passed += 1
            return call.dense()
        grids = _place(moment.layout, site, call, tokens)
        if not grids:
            tally.passed += 1
            tally.fallbacks[moment.problem or f"{tokens} tokens do not fit the token grid"] += 1
            return call.dense()
        runtime.grids.update(grids)
        with runtime.attention.running(call.query.device):
            return self._main_call(site, call, grids, moment, tally)

    def _main_call(
        self,
        site: Site,
        call: SeamCall,
        grids: tuple[TokenGrid, ...],
        moment: Moment,
        tally: Tally,
    ) -> torch.Tensor:
        """Run one eligible call by the plan, dense where the plan or a reason says so.

        Several grids mean rows of different text length: each row is a call of its own, and what
        pads it stays zero, as nothing reads it.
        """
        runtime = self.runtime
        heads = call.query.shape[1 if call.heads_first else 2]
        rules = runtime.rules(site, moment.step, moment.steps, heads)
        if moment.steps == 0 and runtime.plan.needs_steps:
            tally.fallbacks[UNKNOWN_LENGTH] += 1
        if all(method.name == "dense" for _, method in rules):
            tally.dense += len(grids)
            return call.dense()
        if len(grids) == 1:
            return self._sparse_call(site, call, grids[0], rules, moment, tally)
        out = torch.zeros_like(call.query)
        axis = 2 if call.heads_first else 1
        for index, grid in enumerate(grids):
            row = call.row(index, grid.total)
            part = self._sparse_call(site, row, grid, rules, moment, tally)
            out[index : index + 1].narrow(axis, 0, grid.total).copy_(part)
        return out

    def _sparse_call(
        self,
        site: Site,
        call: SeamCall,
        grid: TokenGrid,
        rules: list[HeadRule],
        moment: Moment,
        tally: Tally,
    ) -> torch.Tensor:
        """Run a call the plan wants sparse; the stock function where it cannot be."""
        runtime = self.runtime
        ordinal = moment.ordinals[site.name]
        moment.ordinals[site.name] += 1
        attention, reason = self._attention_call(site, call, grid, ordinal, moment)
        if attention is None:
            tally.dense += 1
            tally.fallbacks[reason] += 1
            return call.dense()
        with runtime.sparse_calls.running(call.query.device):
            return self._run(attention, rules, call, tally)

    def _attention_call(
        self, site: Site, call: SeamCall, grid: TokenGrid, ordinal: int, moment: Moment
    ) -> tuple[AttentionCall | None, str]:
        """Return the call as methods see it, or why there is none."""
        reason = _refusal(call)
        if reason:
            return None, reason
        q, k, v = call.query, call.key, call.value
        if call.heads_first:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if k.shape[2] != q.shape[2] and q.shape[2] % k.shape[2] == 0:
            k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
        if self.runtime.check_finite and not _is_finite(q, k, v):
            return None, NOT_FINITE
        mask = self._key_mask(call.options.get("attn_mask"), q, moment)
        if mask.reason:
            return None, mask.reason
        key = (site.name, moment.branch, ordinal)
        try:
            return AttentionCall(
                q,
                k,
                v,
                grid,
                layer=site.layer,
                step=moment.step,
                steps=moment.steps,
                branch=moment.branch,
                scale=call.options.get("scale"),
                key_mask=mask.keep,
                memory=self.runtime.recall(key, (q.shape, q.dtype, q.device, grid)),
            ), ""
        except UnsupportedCall as error:
            return None, str(error)

    def _key_mask(self, mask: torch.Tensor | None, query: torch.Tensor, moment: Moment) -> KeyMask:
        """Work a mask out once per forward: reading it makes a GPU wait."""
        if mask is None:
            return KeyMask(None)
        if id(mask) in moment.masks:
            return moment.masks[id(mask)][1]
        batch, tokens = query.shape[:2]
        found = key_mask(mask, batch, tokens, self.family.pairwise_mask)
        if mask.numel() <= batch * tokens:  # made once per forward; pairwise ones once per layer
            moment.masks[id(mask)] = (mask, found)
        return found

    def _run(
        self, whole: AttentionCall, rules: list[HeadRule], call: SeamCall, tally: Tally
    ) -> torch.Tensor:
        """Run each group of heads by its method; the stock function where nothing is sparse."""
        runtime = self.runtime

        def stock() -> torch.Tensor:
            out = call.dense()
            return out.transpose(1, 2) if call.heads_first else out

        meter = Meter(runtime.backend, whole, stock, runtime.backend_work)
        groups = []
        for heads, method in rules:
            part = whole.heads(heads) if len(rules) > 1 else whole
            reasons = [] if method.name == "dense" else method.not_supported(part)
            for reason in reasons:
                tally.fallbacks[reason] += 1
            groups.append((heads, None if reasons or method.name == "dense" else method, part))
        if all(method is None for _, method, _ in groups):
            tally.dense += 1
            return call.dense()
        try:
            parts = [
                (heads, meter.dense(part) if method is None else method.attend(part, meter))
                for heads, method, part in groups
            ]
        except UnsupportedCall as error:
            tally.dense += 1
            tally.fallbacks[str(error)] += 1
            return call.dense()
        self._note(meter, whole, tally)
        out = parts[0][1] if len(parts) == 1 else _scatter(whole, parts)
        return out.transpose(1, 2) if call.heads_first else out

    def _note(self, meter: Meter, whole: AttentionCall, tally: Tally) -> None:
        density = meter.density(whole)
        if meter.declined:
            tally.fallbacks[DENSE_IS_FASTER] += 1
        if meter.was_sparse or (isinstance(density, float) and density < 1):
            tally.sparse += 1
            tally.sparse_density = tally.sparse_density + density
            self.runtime.used |= meter.used
            return
        tally.dense += 1
        if not meter.declined:
            tally.fallbacks[KEEPS_ALL] += 1


def _place(layout: Layout | None, site: Site, call: SeamCall, tokens: int) -> tuple[TokenGrid, ...]:
    """Return the geometry of a call: one for all rows, or one per row; nothing when none fits."""
    if layout is None:
        return ()
    grid = layout.place(site.path, tokens)
    return (grid,) if grid is not None else layout.by_row(call.query.shape[0], tokens)


def _scatter(
    whole: AttentionCall, parts: list[tuple[tuple[int, ...], torch.Tensor]]
) -> torch.Tensor:
    """Put the results of groups of heads together, [B, S, H, D]."""
    out = torch.empty_like(whole.query, memory_format=torch.contiguous_format)
    for heads, result in parts:
        where = torch.as_tensor(heads, device=out.device)
        out.index_copy_(2, where, result.to(out.dtype))
    return out


def _refusal(call: SeamCall) -> str:
    """Return why only the stock function can run a call, "" when methods can."""
    options = call.options
    if options.get("is_causal"):
        return "causal attention"
    if options.get("dropout_p"):
        return "attention dropout"
    if options.get("attention_kwargs"):
        return "the processor passes backend-specific attention arguments"
    if options.get("parallel_config") is not None:
        return "context parallelism splits the sequence over devices"
    if any(type(m).__name__ == "AttentionScoreSkipFunctionMode" for m in _function_modes()):
        return "perturbed attention guidance skips the attention scores here"
    return ""


def _function_modes() -> list[Any]:
    if not torch._C._len_torch_function_stack():
        return []
    from torch.overrides import _get_current_function_mode_stack

    modes: list[Any] = list(_get_current_function_mode_stack())
    return modes


def _is_finite(*tensors: torch.Tensor) -> bool:
    """Whether no tensor holds NaN or infinity: one sum each, one wait for the device."""
    total = tensors[0].sum(dtype=torch.float32)
    for tensor in tensors[1:]:
        total = total + tensor.sum(dtype=torch.float32)
    return bool(torch.isfinite(total))
