"""Two lanes over one latent: one keeps FreeSwim's window, the other lends it its text attention.

Source: arXiv:2511.14712 and WillWu111/FreeSwim. The authors push both lanes through the model as a
batch of two; here they follow each other. The full lane never reads the window lane, so its pass
comes first and leaves the raw text attention of every block, which the window lane then takes.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from dittools.errors import AttachError, InputError, UnsupportedCall
from dittools.kernels.auto import resolve
from dittools.methods import Method
from dittools.patches.attach import (
    Target,
    _components,
    _resolve_plan,
    attach,
    find_targets,
    model_facts,
)
from dittools.patches.batch import rows_of, take
from dittools.patches.install import not_interceptable, put_shadow, root_of, select
from dittools.patches.report import Report
from dittools.patches.root import Root
from dittools.patches.runtime import Runtime
from dittools.patches.sites import SITE_ATTRIBUTE, SeamCall, Site
from dittools.patches.summary import summarise
from dittools.plans import Plan


@dataclass(frozen=True)
class LaneSettings:
    """How the lanes run.

    Attributes:
        window: what the first lane's self-attention is.
        full: what the second lane's is, an empty plan for full attention; None for no second lane.
        temperature: factor on the scores of self-attention in both lanes.
        interval: steps between two passes of the second lane, in which the pass with the prompt
            takes its last text attention; None runs it in every pass, without the prompt as well.
        cache_device: where the text attention waits; None leaves it where it was computed.
        backend: as for `attach`.
    """

    window: Method
    full: Plan | None
    temperature: float = 1.0
    interval: int | None = None
    cache_device: str | None = None
    backend: str = "auto"


class Lanes:
    """Both lanes on a pipeline; a context manager that restores the pipeline at its end."""

    def __init__(self, pipe: Any, settings: LaneSettings) -> None:
        """Put everything on the denoisers of a pipeline; on an error everything is taken off.

        Raises:
            InputError: a family without text cross-attention, or a step cache, with a second lane.
            AttachError: a plan is attached already, or nothing here can be attached to.
        """
        self.settings = settings
        self._targets = find_targets(pipe)
        self._lanes: list[_Lane] = []
        self._held: dict[str, torch.Tensor] = {}  # site name -> text attention of the full lane
        check_lanes(self._targets, settings)
        with ExitStack() as undo:
            plan = Plan.of(settings.window)
            self._window = attach(pipe, plan, backend=settings.backend)
            undo.callback(self._window.detach)
            runtime = self._window.runtime
            self._full = Runtime(
                settings.full or Plan(), resolve(settings.backend), pipe, runtime.check_finite
            )
            for target in self._targets:
                lane = _Lane(target, settings, self._full, self._held)
                self._lanes.append(lane)
                if settings.full is not None:
                    hook = target.denoiser.register_forward_pre_hook(lane, with_kwargs=True)
                    undo.callback(hook.remove)
            self._undo = undo.pop_all()

    def __enter__(self) -> "Lanes":
        """Return the lanes."""
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the pipeline exactly."""
        self._undo.close()
        self._held.clear()

    def reports(self) -> dict[str, Report]:
        """Return what each lane did, by "window" and "full"; to be asked before the end."""
        found = {"window": self._window.report()}
        if self.settings.full is not None:
            targets = self._targets
            names = ", ".join(dict.fromkeys(type(t.denoiser).__name__ for t in targets))
            found["full"] = summarise(
                self._full,
                [lane.root for lane in self._lanes],
                [target.denoiser for target in targets],
                f"{targets[0].family.name} ({names})",
                "second lane of FreeSwim",
                [],
            )
        return found

    @property
    def refreshes(self) -> list[int]:
        """Steps in which the second lane ran, ascending."""
        return sorted({step for lane in self._lanes for step in lane.refreshes})

    @property
    def cache_peak_bytes(self) -> int:
        """Most memory the text attention took at once."""
        return max((lane.peak_bytes for lane in self._lanes), default=0)


class _Lane:
    """Forward pre-hook of one denoiser, and the root of its text cross-attention sites."""

    def __init__(
        self,
        target: Target,
        settings: LaneSettings,
        full: Runtime,
        held: dict[str, torch.Tensor],
    ) -> None:
        self.root = cast(Root, root_of(target.denoiser))
        self._settings, self._full, self._held = settings, full, held
        self.refreshes: list[int] = []
        self.peak_bytes = 0
        self._calls: Counter[str] = Counter()  # per site, in the forward under way
        self._is_full = False
        self._taken: slice | None = None  # rows of the window lane that take what is held
        self._text_call: dict[str, int] = {}
        for site in self.root.sites:
            site.root = cast(Root, _Tempered(self.root, settings.temperature))
        if settings.full is not None:
            self._add_sites(target)

    def _add_sites(self, target: Target) -> None:
        facts = target.family.refining
        assert facts is not None  # _check has seen it
        for layer, path in enumerate(select(target.denoiser, facts.text_sites)):
            module = target.denoiser.get_submodule(path)
            problem = not_interceptable(module)
            if problem:
                raise InputError(f"the text attention at {path} cannot be exchanged: {problem}")
            site = Site(path, f"{target.component}.{path}", layer, cast(Root, self))
            module.__dict__[SITE_ATTRIBUTE] = site  # detaching takes it off again
            self._text_call[site.name] = facts.text_call(module)
            put_shadow(module)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Before a forward of the window lane: run the full lane where one is due."""
        self._calls.clear()
        if self._is_full:
            return
        moment = self.root.moment
        if moment is None:
            raise UnsupportedCall("the denoiser ran before its geometry was known")
        arguments = dict(self.root._bind(denoiser, args, kwargs))
        rows = rows_of(arguments, self.root.family.batched, self.root.runtime.clock.pipe)
        interval = self._settings.interval
        if interval is None:
            self._taken = slice(0, rows.total)
            self._run_full(denoiser, args, kwargs, moment.step)
            return
        if moment.branch == "uncond":
            self._taken = None
            return
        self._taken = rows.cond
        # another denoiser may have taken over: it has nothing to reuse
        if moment.step % interval == 0 or not self._held.keys() >= self._text_call.keys():
            if rows.copies > 1:
                arguments.pop("self", None)
                kwargs = {name: take(value, rows, name) for name, value in arguments.items()}
                args = ()
            self._run_full(denoiser, args, kwargs, moment.step)

    def _run_full(
        self,
        denoiser: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        step: int,
    ) -> None:
        """Run the forward in the full lane and keep its text attention, not its prediction."""
        root = self.root
        saved = root.runtime, root.moment, root._unnamed
        self._held.clear()
        self._is_full, root.runtime = True, self._full
        try:
            denoiser(*args, **kwargs)
        finally:
            self._is_full = False
            root.runtime, root.moment, root._unnamed = saved
            self._calls.clear()
        missing = [name for name in self._text_call if name not in self._held]
        if missing:
            raise InputError(
                f"the text attention of {len(missing)} blocks never came by, first {missing[0]}",
                remedy="a model that is not compiled and skips no block, or mode='window'",
            )
        self.refreshes.append(step)
        taken = sum(t.numel() * t.element_size() for t in self._held.values())
        self.peak_bytes = max(self.peak_bytes, taken)

    def attend(self, site: Site, call: SeamCall) -> torch.Tensor:
        """Return one cross-attention: the full lane's is kept, the window lane takes it."""
        ordinal = self._calls[site.name]
        self._calls[site.name] += 1
        if ordinal != self._text_call[site.name]:  # the image of an image-to-video model
            return call.dense()
        if self._is_full:
            out = call.dense()
            self._held[site.name] = out.detach().to(self._settings.cache_device or out.device)
            return out
        if self._taken is None:
            return call.dense()
        held = self._held[site.name]
        if self._settings.interval is None:
            del self._held[site.name]
        held = held.to(call.query.device)
        if held.shape[0] == call.query.shape[0]:
            return held
        out = call.dense().clone()
        out[self._taken] = held
        return out


class _Tempered:
    """The root of a self-attention site, asked with scores times a factor."""

    def __init__(self, root: Root, factor: float) -> None:
        self._root, self._factor = root, factor

    def attend(self, site: Site, call: SeamCall) -> torch.Tensor:
        """Return the attention of one call, whatever the plan makes of it, at the factor."""
        if self._factor != 1.0:
            scale = call.options.get("scale")
            own = float(call.query.shape[-1]) ** -0.5 if scale is None else float(scale)
            call = replace(call, options={**call.options, "scale": own * self._factor})
        return self._root.attend(site, call)


def text_sites(target: Target) -> list[str]:
    """Return the module paths through which text enters a denoiser, none where it is joint."""
    facts = target.family.refining
    return [] if facts is None else select(target.denoiser, facts.text_sites)


def check_lanes(targets: list[Target], settings: LaneSettings) -> None:
    """Raise when lanes cannot run on some denoisers; see `Lanes`."""
    for target in targets:
        _check(target, settings)


def lane_plan(pipe: Any, plan: str | Path | Method | Plan) -> Plan:
    """Return the plan that `attach` would run on a pipeline, checked against it.

    Raises:
        PlanError, UnknownMethod: as for `attach`.
    """
    targets = find_targets(pipe)
    chosen, _ = _resolve_plan(plan, targets[0], _components(pipe))
    for target in targets:
        chosen.check(model_facts(target.denoiser, target.paths))
    return chosen


def _check(target: Target, settings: LaneSettings) -> None:
    name = type(target.denoiser).__name__
    if root_of(target.denoiser) is not None:
        raise AttachError(
            f"a plan is attached to {target.component}, and FreeSwim brings its own",
            remedy="dittools.detach(pipe), then hand the plan over as plan= for the second lane",
        )
    if settings.full is None:
        return
    if not text_sites(target):
        raise InputError(
            f"{name} has no cross-attention to the text that one lane could lend the other",
            expected="a model with text apart from the video, such as Wan or LTX-Video",
            remedy="mode='window', which needs none",
        )
    if getattr(target.denoiser, "is_cache_enabled", False):
        raise InputError(
            f"{name} has a step cache, which leaves out blocks whose text attention is to be kept",
            remedy=f"pipe.{target.component}.disable_cache(), or mode='window'",
        )
    if getattr(settings.full, "guidance", None) is not None:
        raise InputError(
            "the plan of the second lane carries head guidance, but that lane predicts nothing",
            remedy="a plan without guidance",
        )
