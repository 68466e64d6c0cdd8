"""Methods that make a test's point, and short runs of toy pipelines; shared by several files."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import diffusers
import pytest
import torch

from dittools.call import AttentionCall
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods import build
from dittools.pipelines import tiny

SPARSE = build("random", {"density": 0.4, "block_size": 8})


@dataclass(frozen=True)
class Whole:
    """Runs the sparse path with a mask that keeps everything: must equal dense attention."""

    name: ClassVar[str] = "whole"

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        size = max(8, call.query.shape[1] // 3)  # ragged: three blocks and a rest
        mask = BlockMask.full(call.query.shape[1], call.key.shape[1], size)
        return backend.block_sparse(call, mask)


@dataclass(frozen=True)
class Spy:
    """Notes every call it is given and runs it dense."""

    name: ClassVar[str] = "spy"
    seen: list[AttentionCall] = field(default_factory=list)

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        self.seen.append(call)
        return backend.dense(call)


@dataclass(frozen=True)
class Zeros:
    """Returns zeros, so that whatever it runs on leaves a mark."""

    name: ClassVar[str] = "zeros"

    def not_supported(self, call: AttentionCall) -> list[str]:
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        return torch.zeros_like(call.query)


OLD = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 42)


@cache
def shared(name: str) -> Any:
    """The toy pipeline of that name, one for all tests; skips where diffusers is too old for it."""
    return build_toy(name)


def build_toy(name: str) -> Any:
    """A fresh toy pipeline; skips where diffusers is too old for it."""
    try:
        return tiny.build(name)
    except ImportError as error:
        if not OLD:
            raise
        lacks = str(error).split("'")[1]
        pytest.skip(f"diffusers {diffusers.__version__} has no {lacks}")


def generate(pipe: Any, name: str, *, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Latents of a short generation, the same every time."""
    arguments = {**tiny.call_arguments(name), "output_type": "latent", **changes}
    made = pipe(**arguments, generator=torch.Generator().manual_seed(seed))
    latents: torch.Tensor = made.frames if hasattr(made, "frames") else made.images
    return latents
