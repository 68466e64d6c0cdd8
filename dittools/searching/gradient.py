"""How much an error of each head matters in the end, by a backward pass through the sampler.

A random vector over the final latents is carried back to every attention output. The mean square of
what arrives, per squared error of the output, is the weight: E (g . e)^2 over the vectors is the
squared final error of a small error e. Every forward of the denoiser is checkpointed, so that the
latents of all steps and the activations of one forward are held at a time.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from dittools.call import AttentionCall
from dittools.errors import InputError
from dittools.kernels import Backend
from dittools.patches import attach
from dittools.patches.attach import Attachment, find_targets
from dittools.pipelines.generate import Settings, call_arguments
from dittools.plans import Plan, Rule
from dittools.searching.probe import BRANCHES, Sites
from dittools.searching.scout import Facts
from dittools.searching.store import Result


class Tap:
    """A method that runs dense and notes the gradient that reaches each head's output.

    Attributes:
        total: float64 [L, steps, branches, H], mean squared gradient per token, summed over calls.
        calls: [L, steps, branches].
    """

    name: ClassVar[str] = "tap"

    def __init__(self, sites: Sites) -> None:
        """Make room for the sums."""
        shape = (sites.layers, sites.steps, len(BRANCHES))
        self.sites = sites
        self.total = torch.zeros((*shape, sites.heads), dtype=torch.float64)
        self.calls = torch.zeros(shape, dtype=torch.float64)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Every call can be watched."""
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return dense attention; its gradient is noted when it comes back."""
        out = backend.dense(call)
        if out.requires_grad and call.head_count == self.sites.heads:
            branch = call.branch if call.branch in BRANCHES else ""
            where = (call.layer, call.step, BRANCHES.index(branch))
            size = call.grid.total / self.sites.grid.total  # more tokens, more errors to add up
            out.register_hook(lambda gradient: self._note(where, gradient * size**0.5))
        return out

    def _note(self, where: tuple[int, int, int], gradient: torch.Tensor) -> None:
        self.total[where] += gradient.double().square().sum(dim=3).mean(dim=(0, 1)).cpu()
        self.calls[where] += 1


def carry_back(pipe: Any, settings: Settings, sites: Sites, vectors: int, seed: int) -> Result:
    """Return what arrived at every head: the sums of a `Tap` over random vectors, and the calls.

    Args:
        pipe: a stock pipeline that takes `latents` and gives them back.
        settings: one generation.
        sites: layers, heads and steps.
        vectors: random vectors over the final latents.
        seed: of the vectors.
    Raises:
        InputError: the pipeline cannot be differentiated.
    """
    tap = Tap(sites)
    with attach(
        pipe, Plan((Rule(tap),)), backend="reference", check_finite=False, recorder=False
    ) as handle:
        restore = _checkpointed(pipe, handle)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                final = _final_latents(pipe, settings)
                _draw_back(final, vectors, seed)
        finally:
            restore()
    return {"gradient": tap.total, "calls": tap.calls}


def _draw_back(final: torch.Tensor, vectors: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number in range(vectors):
        vector = torch.randn(final.shape, generator=generator).to(final.device, final.dtype)
        final.backward(vector, retain_graph=number < vectors - 1)


def _final_latents(pipe: Any, settings: Settings) -> torch.Tensor:
    """Return the latents a generation ends in, with the graph that made them."""
    run = getattr(type(pipe).__call__, "__wrapped__", None)
    accepted = inspect.signature(type(pipe).__call__).parameters
    if run is None or "latents" not in accepted or "output_type" not in accepted:
        raise InputError(
            f"{type(pipe).__name__} cannot be run backward",
            expected="a pipeline under no_grad that takes latents and an output_type",
            remedy="sensitivity by perturbed generations",
        )
    arguments = {**call_arguments(pipe, settings), "output_type": "latent"}
    found = run(pipe, **{**arguments, "latents": _first_latents(pipe, arguments)})
    final = getattr(found, "frames", None)
    final = getattr(found, "images", None) if final is None else final
    if not isinstance(final, torch.Tensor) or not final.requires_grad:
        raise InputError(
            f"{type(pipe).__name__} gives no latents that lead back to its steps",
            remedy="sensitivity by perturbed generations",
        )
    return final


class _Found(Exception):
    """Carries the first latents out of a run that is broken off."""


def _first_latents(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Return the latents a run would start from, as a leaf that takes a gradient."""
    original = pipe.prepare_latents

    def caught(*args: Any, **kwargs: Any) -> Any:
        raise _Found(original(*args, **kwargs))

    pipe.prepare_latents = caught
    try:
        with torch.no_grad():
            pipe(**arguments)
    except _Found as found:
        made = found.args[0]
    finally:
        del pipe.prepare_latents
    first = made[0] if isinstance(made, tuple) else made
    leaf: torch.Tensor = first.detach().clone().requires_grad_(True)
    return leaf


def _checkpointed(pipe: Any, handle: Attachment) -> Callable[[], None]:
    """Checkpoint every forward of the denoisers; return what undoes it.

    A forward that is run again stands at the moment it stood at first, whatever came since.
    """
    undo = []
    for target, root in zip(find_targets(pipe), handle._roots, strict=True):
        denoiser, forward = target.denoiser, target.denoiser.forward

        def outer(*args: Any, forward: Any = forward, root: Any = root, **kwargs: Any) -> Any:
            moment = root.moment

            def inner(*some: Any, **named: Any) -> Any:
                root.moment = moment
                return forward(*some, **named)

            return checkpoint(inner, *args, use_reentrant=False, **kwargs)

        outer.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        was_own = "forward" in vars(denoiser)
        denoiser.forward = outer
        undo.append((denoiser, forward, was_own))

    def restore() -> None:
        for denoiser, forward, was_own in undo:
            if was_own:
                denoiser.forward = forward
            else:
                del denoiser.forward

    return restore


def gradient_weights(
    result: Result, sites: Sites, facts: Facts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 weights [L, R, H], and [L, R, 2, H] of the branches (equal where not told).

    The weight of a head is the mean squared gradient over the steps of a range, per squared error
    behind the output projection, in which errors are measured.
    """
    total, calls = result["gradient"].double(), result["calls"].double()
    gains = [None if g is None else g.double().diagonal(dim1=1, dim2=2).sum(1) for g in facts.gains]
    size = torch.stack(
        [
            torch.full((sites.heads,), float(facts.model.head_dim)) if g is None else g.cpu()
            for g in gains
        ]
    ).double()
    spans = torch.tensor([sites.range_of(step) for step in range(sites.steps)])
    ranges = len(sites.ranges) - 1
    summed = total.new_zeros((sites.layers, ranges, len(BRANCHES), sites.heads))
    seen = calls.new_zeros((sites.layers, ranges, len(BRANCHES)))
    summed.index_add_(1, spans, total)
    seen.index_add_(1, spans, calls)
    by_branch = summed / seen.clamp(min=1)[..., None] / size[:, None, None]
    every = summed.sum(dim=2) / seen.sum(dim=2).clamp(min=1)[..., None] / size[:, None]
    every = every.clamp(min=1e-30)
    pair = torch.where(seen[:, :, :2, None] > 0, by_branch[:, :, :2], every[:, :, None])
    return every, pair.clamp(min=1e-30)
