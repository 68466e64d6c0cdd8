"""Which denoising step and which guidance branch a forward belongs to; read, never wrapped."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Place(NamedTuple):
    """Where in the run a forward stands.

    Attributes:
        step: from 0.
        steps: of the run, 0 when not known.
        is_new_run: whether a run began with this forward.
    """

    step: int
    steps: int
    is_new_run: bool


class Followed:
    """A pipeline, and its scheduler, which a pipeline made from it may use when it is gone."""

    def __init__(self, pipe: Any) -> None:
        """Read the scheduler now; it is read again, since users replace it."""
        self.pipe = weakref.ref(pipe)
        self._scheduler = getattr(pipe, "scheduler", None)  # a copy being made has none yet
        self._seen = None if self._scheduler is None else _state(self._scheduler)

    @property
    def scheduler(self) -> Any:
        """The scheduler now, the last known one when the pipeline is gone; None without one."""
        pipe = self.pipe()
        if pipe is not None:
            self._scheduler = getattr(pipe, "scheduler", None)
        return self._scheduler

    def moved(self) -> int:
        """Return what happened since the last look: 2 a new run, 1 a step, 0 nothing."""
        before, self._seen = self._seen, _state(self.scheduler)
        timesteps, index = self._seen
        if before is None:  # a finished run was copied with its place
            return 2 if index is None else 0
        return 2 if timesteps is not before[0] else int(index != before[1])


def _state(scheduler: Any) -> tuple[Any, Any]:
    """Return the timesteps, a new tensor for every run, and the place among them."""
    return getattr(scheduler, "timesteps", None), getattr(scheduler, "_step_index", None)


class StepClock:
    """Finds the step from the pipeline's scheduler, or from changes of the timestep.

    Shared by all denoisers of one attachment, so that two transformers count one run, and by copies
    of the pipeline, which have schedulers of their own.
    """

    def __init__(self, pipe: Any) -> None:
        """Follow a pipeline.

        Args:
            pipe: holds the scheduler. None when a denoiser was attached on its own.
        """
        self._followed = [] if pipe is None else [Followed(pipe)]
        self._current = self._followed[0] if self._followed else None
        self._timesteps: Any = None
        self._last_value: float | None = None
        self._direction = 0.0
        self._step = -1
        self._begin = 0

    def follow_copies(self, copies: Mapping[int, Any]) -> None:
        """Follow copies of the pipelines too.

        Args:
            copies: the memo of `copy.deepcopy`: copy by id of the original.
        """
        pipes = [one.pipe() for one in self._followed]
        twins = [copies.get(id(pipe)) for pipe in pipes if pipe is not None]
        known = {id(pipe) for pipe in pipes}
        self._followed += [Followed(t) for t in twins if t is not None and id(t) not in known]

    @property
    def pipe(self) -> Any:
        """The pipeline, None without one."""
        return None if self._current is None else self._current.pipe()

    @property
    def is_guided(self) -> bool | None:
        """Whether the run that is under way is guided; None where the pipeline does not tell."""
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        return None if guided is None else bool(guided)

    def observe(self, timestep: Any) -> Place:
        """Return the place of a forward that was given this timestep."""
        scheduler = self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or getattr(scheduler, "num_inference_steps", 1) is None:
            return self._by_change(_first_value(timestep))
        # set_timesteps makes a new tensor: that is what marks a run of one step as a new one
        is_new = timesteps is not self._timesteps
        if not is_new and _is_over(scheduler, timesteps):
            return self._by_change(_first_value(timestep))  # the run has a scheduler of its own
        self._timesteps = timesteps
        if is_new:
            self._step = -1
            self._last_value = None
            self._begin = _first_index(scheduler, timesteps, timestep)
        begin = self._begin
        step = self._by_scheduler(scheduler, timesteps, begin, timestep)
        step = min(step, max(len(timesteps) - begin - 1, 0))  # a forward after the end of a run
        is_new = is_new or step < self._step
        self._step = step
        return Place(step, len(timesteps) - begin, is_new)

    def _scheduler(self) -> Any:
        """Return the scheduler that began a run or moved since the last forward, else the last."""
        moved = [(one.moved(), one) for one in self._followed]
        most = max((how for how, _ in moved), default=0)
        if most and (most, self._current) not in moved:
            self._current = next(one for how, one in moved if how == most)
        return None if self._current is None else self._current.scheduler

    def _by_scheduler(self, scheduler: Any, timesteps: Any, begin: int, timestep: Any) -> int:
        if hasattr(scheduler, "_step_index"):
            index = scheduler._step_index
            return max(0 if index is None else int(index) - begin, 0)
        if isinstance(getattr(scheduler, "counter", None), int):  # PNDM repeats a timestep
            return int(scheduler.counter)
        value = _first_value(timestep)
        matches = [i for i, t in enumerate(_values(timesteps)) if t == value]
        later = [i for i in matches if i >= self._step]
        if matches:
            self._last_value = value
            return (later or matches)[0]
        if value != self._last_value:  # rescaled by the pipeline: count its changes
            self._last_value = value
            return self._step + 1
        return max(self._step, 0)

    def _by_change(self, value: float | None) -> Place:
        """Without a scheduler a new value is a new step, and a change of direction a new run."""
        last, self._last_value = self._last_value, value
        if last is None or value is None or self._step < 0:
            self._step, self._direction = 0, 0.0
            return Place(0, 0, True)
        if value == last:
            return Place(self._step, 0, False)
        direction = 1.0 if value > last else -1.0
        if self._direction and direction != self._direction:
            self._step, self._direction = 0, 0.0
            return Place(0, 0, True)
        self._direction = direction
        self._step += 1
        return Place(self._step, 0, False)


def _is_over(scheduler: Any, timesteps: Any) -> bool:
    """Whether a scheduler has no step left to take."""
    index = getattr(scheduler, "_step_index", None)
    return isinstance(index, int) and index >= len(timesteps)


def _first_index(scheduler: Any, timesteps: Any, timestep: Any) -> int:
    """Return where in the schedule a run begins: later than 0 when it starts from a picture.

    Most pipelines tell the scheduler; the others start at the first timestep they ask for.
    """
    begin = getattr(scheduler, "_begin_index", None)
    if begin is not None or not hasattr(scheduler, "_step_index"):
        return int(begin or 0)
    values = _values(timesteps)
    value = _first_value(timestep)
    is_rescaled = value is not None and value <= 1 < max(values)  # given in 0..1, not as counted
    return values.index(value) if value in values and not is_rescaled else 0


def _first_value(timestep: Any) -> float | None:
    """Return the first timestep of the batch; waits for the device."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.flatten()[0])
    return None if timestep is None else float(timestep)


def _values(timesteps: Any) -> Sequence[float]:
    values: Sequence[float] = torch.as_tensor(timesteps).tolist()
    return values


_NAMES = {"pred_cond": "cond", "pred_uncond": "uncond"}
HOOK_NAME = "dittools_branch"


def follow_branch(denoiser: torch.nn.Module) -> "Callable[[], str | None]":
    """Return a function that tells the name of the open `cache_context`, None outside of one.

    diffusers pushes the name into every stateful hook of the module. Ours takes part in that list
    without wrapping `forward`: offloading resets `forward`, and a wrapped one cannot be copied.
    """
    from diffusers.hooks import HookRegistry, ModelHook
    from diffusers.hooks.hooks import HookFunctionReference, StateManager

    class BranchName(StateManager):  # type: ignore[misc]
        """Keeps the name of the context instead of a state per context."""

        def __init__(self) -> None:
            super().__init__(None)
            self.name: str | None = None

        def set_context(self, context: Any) -> None:
            name = getattr(context, "name", context)
            self.name = None if name is None else _NAMES.get(name, str(name))

        def reset(self, *args: Any, **kwargs: Any) -> None:
            self.name = None

    class BranchHook(ModelHook):  # type: ignore[misc]
        """Receives the branch name; shared by copies of the model, left out of pickles."""

        _is_stateful = True

        def __init__(self, made_registry: bool) -> None:
            super().__init__()
            self.branch = BranchName()
            self.made_registry = made_registry

        def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
            self.branch.reset()
            return module

        def __deepcopy__(self, memo: dict[int, Any]) -> "BranchHook":
            return self

        def __reduce__(self) -> Any:
            return ModelHook, ()

    hook = BranchHook(not hasattr(denoiser, "_diffusers_hook"))
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.hooks[HOOK_NAME] = hook
    registry._hook_order.insert(0, HOOK_NAME)
    registry._fn_refs.insert(0, HookFunctionReference())
    _forget_children(registry)
    return lambda: hook.branch.name


def unfollow_branch(denoiser: torch.nn.Module) -> None:
    """Undo `follow_branch`; nothing happens when it was not called."""
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is None or HOOK_NAME not in registry.hooks:
        return
    index = registry._hook_order.index(HOOK_NAME)
    hook = registry.hooks.pop(HOOK_NAME)
    registry._hook_order.pop(index)
    registry._fn_refs.pop(index)
    _forget_children(registry)
    if hook.made_registry and not registry.hooks:
        del denoiser._diffusers_hook


def _forget_children(registry: Any) -> None:
    forget = getattr(registry, "invalidate_child_registries_cache", None)  # from 0.38
    if forget is not None:
        forget()
