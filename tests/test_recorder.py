"""The flight recorder: faults of sparse attention are seen, named, and answered by dense."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from toys import SPARSE, generate

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.methods.base import tell
from dittools.patches import attach, detach
from dittools.pipelines import tiny

SITES = ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]


@dataclass(frozen=True)
class Talker:
    """Runs sparse, and has something to say of every call."""

    name: ClassVar[str] = "talker"

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        tell(backend, "talker ran a head dense")
        return SPARSE.attend(call, backend)


@pytest.fixture(scope="module")
def shared() -> Any:
    return tiny.build("wan")


@pytest.fixture
def pipe(shared: Any) -> Iterator[Any]:
    yield shared
    detach(shared)


@pytest.fixture(scope="module")
def stock(shared: Any) -> torch.Tensor:
    return generate(shared, "wan")


def test_what_a_method_tells_of_a_call_reaches_the_report(pipe: Any) -> None:
    with attach(pipe, Talker(), backend="reference") as handle:
        generate(pipe, "wan")
        report = handle.report()
    assert report.calls["sparse"] == 16
    assert report.fallbacks == {"talker ran a head dense": 16}
    assert report.fallback_sites == {"talker ran a head dense": SITES}
