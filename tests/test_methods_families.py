"""Every method on every family: one forward of each toy denoiser, as its pipeline called it."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from toys import generate

from dittools.methods import METHODS, Method, build
from dittools.patches import attach
from dittools.patches.meter import DENSE_IS_FASTER
from dittools.patches.refusals import KEEPS_ALL
from dittools.pipelines import tiny

FAMILIES = sorted(set(tiny.TINY) - {"sana"})
# more than the stock toy size where that leaves too few tokens for several blocks
SIZES: dict[str, dict[str, int]] = {
    "mochi": {"height": 64, "width": 96},
    "allegro": {"height": 64, "width": 64},
}


def is_said_by(method: str, reason: str) -> bool:
    """Whether a reason to stay dense is the method's own, or that nothing is gained."""
    return reason in (KEEPS_ALL, DENSE_IS_FASTER) or reason.startswith((f"{method} ", f"{method}:"))


class Forward:
    """The first forward of a toy pipeline, to be repeated at will."""

    def __init__(self, name: str) -> None:
        self.pipe = tiny.build(name)
        self.denoiser = getattr(self.pipe, "transformer", None) or self.pipe.unet
        self.args: tuple[Any, ...] = ()
        self.kwargs: Mapping[str, Any] = {}
        hook = self.denoiser.register_forward_pre_hook(self._keep, with_kwargs=True)
        generate(self.pipe, name, num_inference_steps=2, **SIZES.get(name, {}))
        hook.remove()

    def _keep(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.kwargs:
            self.args, self.kwargs = args, dict(kwargs)

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            made = self.denoiser(*self.args, **{**self.kwargs, "return_dict": False})[0]
        return torch.stack(list(made)) if isinstance(made, list) else made


@cache
def forward(name: str) -> Forward:
    return Forward(name)


@cache
def stock(name: str) -> torch.Tensor:
    return forward(name)()


def cutting(name: str) -> Method:
    """The method with blocks small enough to drop something of a few dozen tokens."""
    if name == "freeswim":  # its factor on the scores stays where its window sees everything
        return build(name, {"native": (3, 3), "attn_temperature": 1.0, "block_size": 16})
    known = {f.name: f for f in fields(METHODS[name])}
    if "block_size" not in known:
        return build(name)
    return build(name, {"block_size": max(16, known["block_size"].metadata["least"] or 0)})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.cell("every method")
def test_every_method_runs_on_every_family(name: str, method: str) -> None:
    run = forward(name)
    with attach(run.pipe, cutting(method), dense_steps=0, backend="cpu") as handle:
        made = run()
        report = handle.report()
    assert made.shape == stock(name).shape
    assert bool(made.isfinite().all())
    assert report.coverage["never_fired"] == {}
    assert all(is_said_by(method, reason) for reason in report.fallbacks)
    sites = [layer for layer in report.layers if layer.sparse + layer.dense]
    assert (
        report.calls["sparse"] + sum(report.fallbacks.values()) >= len(sites) or method == "dense"
    )
    if report.calls["sparse"] == 0:
        assert torch.equal(made, stock(name))
    assert torch.equal(run(), stock(name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.cell("every method")
def test_most_methods_really_drop_something(name: str) -> None:
    """Only what cannot do so at a few dozen tokens keeps every pair."""
    run, changed = forward(name), []
    for method in METHODS:
        with attach(run.pipe, cutting(method), dense_steps=0, backend="cpu") as handle:
            run()
            if handle.report().calls["sparse"] and handle.report().density < 1:
                changed.append(method)
    # of 30 tokens and more text a selection of blocks may have to keep all
    assert "gna" in changed
    assert len(changed) >= len(METHODS) // 3, changed


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.cell("presets by name")
def test_presets_attach_by_name(name: str) -> None:
    run = forward(name)
    for method in METHODS:
        with attach(run.pipe, method) as handle:
            made = run()
            assert bool(made.isfinite().all())
            assert all(is_said_by(method, reason) for reason in handle.report().fallbacks)
            assert handle.report().preset
