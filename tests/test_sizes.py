"""Any size a stock pipeline accepts runs with every method, and no backend sees another picture.

The sizes are drawn. One denoising step is made at each; every attention call of it is given to
every method twice, on the backend under test and on the reference, with the same inputs.
"""

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy
from toys import generate

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.kernels import Backend
from dittools.kernels.reference import ReferenceBackend
from dittools.methods import METHODS, Method, build
from dittools.patches import attach
from dittools.patches.meter import DENSE_IS_FASTER
from dittools.patches.refusals import KEEPS_ALL
from dittools.pipelines import tiny


def is_no_refusal(reason: str) -> bool:
    """Whether a call may stay dense for a reason: a method's own, but never that sizes divide."""
    by_method = reason.split()[0].rstrip(":") in METHODS
    return reason in (KEEPS_ALL, DENSE_IS_FASTER) or (
        by_method and not any(word in reason for word in ("divi", "multiple", "whole"))
    )


class Sizes(NamedTuple):
    """Sides in units of what the stock pipeline accepts; frames where the family has them."""

    unit: int
    height: int
    width: int
    frames: int = 0


# largest multiples drawn; every smaller one down to 1 is accepted too
SIZES = {
    "wan": Sizes(16, 7, 9, 18),
    "flux": Sizes(2, 19, 23),
    "ltx": Sizes(32, 2, 2, 9),
    "sd": Sizes(8, 6, 7),
    "cogvideox": Sizes(16, 5, 7, 13),
    "hunyuan_video": Sizes(16, 4, 5, 13),
}


@cache
def pipeline(name: str) -> Any:
    return tiny.build(name)


def small_blocks(name: str) -> Method:
    """A method with blocks small enough that toy sizes are several of them, ragged at the end."""
    kind = METHODS[name]
    blocks = [f for f in fields(kind) if f.name == "block_size"]
    return build(name, {"block_size": max(16, blocks[0].metadata["least"] or 0)} if blocks else {})


@dataclass(frozen=True)
class Every:
    """Runs every method on the backend it is given and on the reference; returns dense."""

    name: ClassVar[str] = "every"
    ran: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        kept = torch.ones(call.query.shape[:2], dtype=torch.bool)
        if call.key_mask is not None:
            kept = call.key_mask[:, : kept.shape[1]]
        for method in (make(name) for name in METHODS for make in (small_blocks, build)):
            reasons = method.not_supported(call)
            self.reasons.update(reasons)
            if reasons:
                continue
            try:
                made = method.attend(replace(call, memory={}), backend)
            except UnsupportedCall as error:  # what the backend cannot do, with its reason
                self.reasons[f"{method.name}: {error}"] += 1
                continue
            wanted = method.attend(replace(call, memory={}), ReferenceBackend())
            assert made.shape == call.query.shape
            torch.testing.assert_close(
                made[kept], wanted[kept], atol=2e-5, rtol=1e-4, msg=lambda m, n=method: f"{n}: {m}"
            )
            self.ran[method.name] += 1
        return backend.dense(call)


def sizes_of(name: str) -> SearchStrategy[dict[str, int]]:
    unit, height, width, frames = SIZES[name]
    sides = {
        "height": st.integers(1, height).map(lambda n: n * unit),
        "width": st.integers(1, width).map(lambda n: n * unit),
    }
    return st.fixed_dictionaries(sides | ({"num_frames": st.integers(1, frames)} if frames else {}))


def check(name: str, data: DataObject, backend: str) -> None:
    size = data.draw(sizes_of(name))
    every = Every()
    with attach(pipeline(name), every, backend=backend) as handle:
        generate(pipeline(name), name, num_inference_steps=1, guidance_scale=1.0, **size)
        report = handle.report()
    assert report.coverage["never_fired"] == {}
    left_out = {reason.split()[0].rstrip(":") for reason in every.reasons}
    assert set(METHODS) - left_out <= set(every.ran), size
    assert all(is_no_refusal(reason) for reason in (*every.reasons, *report.fallbacks)), size


PROFILE: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.parametrize("name", ["wan", "flux", "ltx", "sd"])
@pytest.mark.cell("any size, every method")
@settings(max_examples=3, **PROFILE)
@given(data=st.data())
def test_no_size_is_refused(name: str, data: DataObject) -> None:
    check(name, data, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "flex"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.cell("any size, every method")
@settings(max_examples=40, **PROFILE)
@given(data=st.data())
def test_no_size_is_refused_over_many_sizes(name: str, backend: str, data: DataObject) -> None:
    check(name, data, backend)
