"""attach and detach: put a plan on a stock pipeline, follow it, take it off without a trace."""

import logging
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dittools.errors import AttachError, InputError, PlanError
from dittools.kernels.auto import resolve
from dittools.methods import METHODS, Method, preset
from dittools.methods.headhunter import HeadHunter
from dittools.patches.adapters import Family, families, family_of
from dittools.patches.guide import Guide, check_pipeline, guidance_report, selected_heads
from dittools.patches.install import install, not_interceptable, root_of, select, uninstall
from dittools.patches.recorder import Recorder
from dittools.patches.report import Report
from dittools.patches.root import Root
from dittools.patches.runtime import Runtime
from dittools.patches.summary import summarise
from dittools.plans import ModelFacts, Plan

EXCHANGES = ("heads", "halo")
logger = logging.getLogger("dittools")


@dataclass(frozen=True)
class Target:
    """One denoiser to attach to: its name in the pipeline, module, family and site paths."""

    component: str
    denoiser: torch.nn.Module
    family: Family
    paths: list[str]

    @property
    def guided_paths(self) -> list[str]:
        """The sites that head-level guidance counts as layers."""
        left_out = self.family.unguided
        return [p for p in self.paths if not any(re.fullmatch(o, p) for o in left_out)]


class Attachment:
    """What `attach` put on a pipeline; a context manager that detaches at its end."""

    def __init__(
        self, runtime: Runtime, targets: list[Target], source: str, notes: list[str]
    ) -> None:
        """Keep what the report needs; `attach` makes attachments."""
        self.runtime = runtime
        self._family = targets[0].family
        self._classes = [type(t.denoiser).__name__ for t in targets]
        self._denoisers = [weakref.ref(t.denoiser) for t in targets]
        self._roots = [Root(t.component, t.family, runtime) for t in targets]
        self._source, self._notes = source, notes
        spec = runtime.plan.guidance
        try:
            for target, root in zip(targets, self._roots, strict=True):
                if spec is not None:
                    heads = selected_heads(spec, target.denoiser, target.guided_paths)
                    root.guide = Guide(spec, root, heads)
            for target, root in zip(targets, self._roots, strict=True):
                install(target.denoiser, root, target.paths)
        except BaseException:
            self.detach()
            raise

    @property
    def plan(self) -> Plan:
        """The plan that runs."""
        return self.runtime.plan

    @property
    def is_attached(self) -> bool:
        """Whether the plan still runs on the model it was attached to."""
        return any(root_of(d) in self._roots for d in self._live())

    def report(self) -> Report:
        """Return what happened since attaching or `reset`; waits for pending CUDA work."""
        family = f"{self._family.name} ({', '.join(dict.fromkeys(self._classes))})"
        notes = [*self._notes, *self._family.notes, *_remarks(self.plan)]
        notes += [self.runtime.ranks] if self.runtime.ranks else []
        found = summarise(self.runtime, self._roots, self._live(), family, self._source, notes)
        return replace(found, guidance=guidance_report([root.guide for root in self._roots]))

    def reset(self) -> None:
        """Start counting and timing anew; methods forget what they remembered."""
        self.runtime.reset()
        self.runtime.memory.clear()
        for root in self._roots:
            if root.guide is not None:
                root.guide.reset()

    def detach(self) -> None:
        """Restore the model exactly; nothing happens when another plan has replaced this one."""
        for denoiser in self._live():
            if root_of(denoiser) in self._roots:
                uninstall(denoiser)

    def _live(self) -> list[torch.nn.Module]:
        return [d for d in (ref() for ref in self._denoisers) if d is not None]

    def __enter__(self) -> "Attachment":
        """Return the attachment."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def __repr__(self) -> str:
        """Name the methods and the model."""
        methods = ", ".join(dict.fromkeys(r.method.name for r in self.plan.rules)) or "dense"
        return f"<Attachment of {methods} to {', '.join(self._classes)}>"


def attach(
    pipe: Any,
    plan: str | Path | Method | Plan | HeadHunter,
    *,
    guidance: HeadHunter | None = None,
    dense_steps: float | int | None = None,
    dense_last_steps: float | int | None = None,
    dense_layers: int | None = None,
    backend: str = "auto",
    check_finite: bool = True,
    recorder: bool | Recorder = True,
    exchange: str = "heads",
) -> Attachment:
    """Return the attachment that runs a plan on a stock pipeline from now on.

    A plan that is already attached is replaced. Calls the plan cannot run stay dense and are named
    in the report.

    Args:
        pipe: a diffusers pipeline, or its denoiser.
        plan: a method's name (settings as published for the model family), a method, a plan, or
            the path of a plan file; guidance alone leaves attention dense.
        guidance: heads whose perturbation guides the run, instead of those the plan names; one
            more pass per step.
        dense_steps: leading steps that stay dense, a share below 1 or a count; None keeps what the
            preset or plan says, 0 for a method given with its parameters.
        dense_last_steps: the same at the end of the run.
        dense_layers: leading layers that stay dense.
        backend: name in `dittools.kernels.backend_names()`.
        check_finite: run calls with NaN or infinite inputs dense and report them.
        recorder: whether the flight recorder looks at accelerated calls: it tells how far they are
            from dense, and heads in trouble run dense for the rest of the run. Without it an
            exception in a kernel ends the run. A Recorder has settings of its own.
        exchange: what context-parallel ranks give each other: "heads" (Ulysses), or "halo": on
            images under gna and clear, the rows around each rank's band.
    Raises:
        AttachError: nothing here can be accelerated, attaching failed and was undone, or guidance
            makes no sense here.
        InputError: guidance names heads the model does not have.
        PlanError: the plan file is unusable or made for another model.
        UnknownMethod: no method has this name.
        UnsupportedCall: no such backend.
    """
    if isinstance(plan, HeadHunter):
        if guidance is not None:
            raise InputError("guidance is given twice", remedy="a plan or method beside guidance=")
        guidance, plan = plan, "dense"
    if not isinstance(check_finite, bool):
        raise InputError(
            "check_finite is not usable", expected="True or False", got=repr(check_finite)
        )
    if exchange not in EXCHANGES:
        raise InputError("unknown exchange", expected=" or ".join(EXCHANGES), got=repr(exchange))
    flight = recorder_of(recorder)
    targets = find_targets(pipe)
    chosen, source = _resolve_plan(plan, targets[0], _components(pipe))
    chosen = chosen.scheduled(
        dense_first_steps=dense_steps, dense_last_steps=dense_last_steps, dense_layers=dense_layers
    )
    for target in targets:
        chosen.check(model_facts(target.denoiser, target.paths))
    chosen = _guided(chosen, guidance, targets, pipe)
    is_module = isinstance(pipe, torch.nn.Module)
    followed = None if is_module else pipe
    runtime = Runtime(chosen, resolve(backend), followed, check_finite, flight)
    runtime.exchange = exchange
    replaced = [(t.denoiser, root_of(t.denoiser)) for t in targets]
    notes = _replace(targets)
    try:
        attachment = Attachment(runtime, targets, source, notes)
    except Exception as error:
        for denoiser, root in replaced:
            if root is not None:
                paths = [site.path for site in root.sites]
                root.sites.clear()
                install(denoiser, root, paths)
        raise AttachError(
            f"attaching to {type(targets[0].denoiser).__name__} failed and was undone: {error}"
        ) from error
    logger.info("attached %r, %s", attachment, source)
    return attachment


def recorder_of(wanted: bool | Recorder) -> Recorder | None:
    """Return the settings of the flight recorder, None for none.

    Raises:
        InputError: neither a bool nor a Recorder.
    """
    if isinstance(wanted, Recorder):
        return wanted
    if not isinstance(wanted, bool):
        raise InputError(
            "recorder is not usable",
            expected="True, False or a Recorder",
            got=repr(wanted),
        )
    return Recorder() if wanted else None


def _guided(plan: Plan, guidance: Any, targets: list[Target], pipe: Any) -> Plan:
    """Return the plan with the guidance that is to run, after checking that it can."""
    spec = plan.guidance if guidance is None else guidance
    if spec is None:
        return plan
    if not isinstance(spec, HeadHunter):
        raise InputError("this is no guidance", expected="a HeadHunter", got=type(spec).__name__)
    for target in targets:
        check_pipeline(pipe, target.denoiser)
        selected_heads(spec, target.denoiser, target.guided_paths)
    return replace(plan, guidance=spec)


def detach(pipe: Any) -> None:
    """Restore a pipeline or denoiser exactly, also when it is a copy of an attached one."""
    for _, denoiser in _denoisers(pipe):
        uninstall(denoiser)


def find_targets(pipe: Any) -> list[Target]:
    """Return every denoiser of a pipeline that can be accelerated.

    Raises:
        AttachError: there is none, with what was found instead.
    """
    found = [(name, d, family_of(d)) for name, d in _denoisers(pipe)]
    known = [(name, d, family) for name, d, family in found if family is not None]
    what = type(pipe).__name__
    if not known:
        classes = ", ".join(type(d).__name__ for _, d, _ in found) or "none"
        raise AttachError(
            f"{what} has no denoiser dittools knows",
            expected=f"one of the families {', '.join(families())}",
            got=f"denoisers: {classes}",
            remedy="dittools.patches.register_family with the facts of this model",
        )
    targets = []
    for name, denoiser, family in known:
        if family.blocked:
            raise AttachError(f"{type(denoiser).__name__}: {family.blocked}")
        paths = select(denoiser, family.sites)
        if not paths:
            raise AttachError(
                f"no attention module of {type(denoiser).__name__} matches",
                expected=" or ".join(family.sites),
                remedy="another diffusers version, or register_family with other paths",
            )
        targets.append(Target(name, denoiser, family, paths))
    return targets


def model_facts(denoiser: torch.nn.Module, paths: list[str]) -> ModelFacts:
    """Return what plans must know of a denoiser; heads and head_dim of its widest site."""
    widest = (0, 0)
    for path in paths:
        module: Any = denoiser.get_submodule(path)
        heads = int(module.heads)
        inner = getattr(module, "inner_dim", None)
        if inner is None:
            inner = module.to_q.out_features
        widest = max(widest, (heads, int(inner) // heads))
    return ModelFacts(type(denoiser).__name__, len(paths), *widest, tuple(paths))


def _remarks(plan: Plan) -> list[str]:
    """Return what methods of the plan have to say about how they run, each remark once."""
    said: list[str] = []
    for rule in plan.rules:
        said += getattr(rule.method, "remarks", list)()
    return list(dict.fromkeys(said))


def _components(pipe: Any) -> Mapping[str, Any]:
    if isinstance(pipe, torch.nn.Module):
        return {"denoiser": pipe}
    parts = getattr(pipe, "components", None)
    return parts if isinstance(parts, Mapping) else {}


def _denoisers(pipe: Any) -> list[tuple[str, torch.nn.Module]]:
    """Return modules that are denoisers by family or usual name, torch.compile unwrapped."""
    parts = _components(pipe)
    if not parts:
        raise AttachError(
            f"{type(pipe).__name__} is neither a diffusers pipeline nor a denoiser",
            expected="an object with components, or a torch module",
        )
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for name, part in parts.items():
        module = getattr(part, "_orig_mod", part)
        if not isinstance(module, torch.nn.Module):
            continue
        usual = name.startswith(("transformer", "unet", "denoiser"))
        if usual or family_of(module) is not None:
            found.setdefault(id(module), (name, module))
    return list(found.values())


def _resolve_plan(
    plan: str | Path | Method | Plan, target: Target, components: Mapping[str, Any]
) -> tuple[Plan, str]:
    """Return the plan and one phrase on where its settings come from."""
    if isinstance(plan, type):
        raise PlanError(
            "this is not a plan",
            expected="a method with its parameters",
            got=f"the class {plan.__name__}",
            remedy=f"{plan.__name__}()",
        )
    if isinstance(plan, Plan):
        return plan, "settings of the plan given"
    if isinstance(plan, Path) or (isinstance(plan, str) and _looks_like_path(plan)):
        return Plan.load(plan), f"plan file {plan}"
    if isinstance(plan, str):
        family = target.family.variant(target.denoiser, components) or target.family.name
        known = preset(plan, family)
        made = Plan.of(
            known.method, dense_first_steps=known.dense_steps, dense_layers=known.dense_layers
        )
        return made, known.source
    if isinstance(plan, Method):
        return Plan.of(plan), "parameters given by the caller"
    raise PlanError(
        "this is not a plan",
        expected="a method name, a method, a Plan, or the path of a plan file",
        got=type(plan).__name__,
        remedy=f"one of {', '.join(METHODS)}",
    )


def _looks_like_path(name: str) -> bool:
    return name not in METHODS and (name.endswith(".json") or "/" in name or "\\" in name)


def _replace(targets: list[Target]) -> list[str]:
    """Take off what is attached already; return notes for the report."""
    notes = []
    for target in targets:
        root = root_of(target.denoiser)
        if root is not None:
            old = ", ".join(dict.fromkeys(r.method.name for r in root.runtime.plan.rules))
            notes.append(f"replaced the {old or 'dense'} plan attached to {target.component}")
            logger.warning(notes[-1])
        uninstall(target.denoiser)
        for path in target.paths:
            problem = not_interceptable(target.denoiser.get_submodule(path))
            if problem:
                notes.append(f"{target.component}.{path}: {problem}")
                logger.warning(notes[-1])
    return notes
