"""Backends: each runs the one attention program (order, mask, bit tiles, key bias) its own way."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, overload, runtime_checkable

import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.mask import BlockMask

# name -> (module, class); imported on first use, so that naming a backend costs nothing
_MODULES: dict[str, tuple[str, str]] = {
    "reference": ("dittools.kernels.reference", "ReferenceBackend"),
    "cpu": ("dittools.kernels.cpu", "CpuBackend"),
    "flex": ("dittools.kernels.flex", "FlexBackend"),
    "triton": ("dittools.kernels.triton_backend", "TritonBackend"),
    "triton_int8": ("dittools.kernels.triton_quant", "int8_backend"),
    "triton_int8_int8": ("dittools.kernels.triton_quant", "int8_values_backend"),
    "triton_int8_fp8": ("dittools.kernels.triton_quant", "fp8_values_backend"),
    "sage": ("dittools.kernels.foreign", "SageBackend"),
    "sparge": ("dittools.kernels.foreign", "SpargeBackend"),
    "natten": ("dittools.kernels.foreign", "NattenBackend"),
    "flash": ("dittools.kernels.foreign", "FlashBackend"),
}
_AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "flex", "reference"),
}
_QUANTISED: dict[str, tuple[str, ...]] = {  # on CUDA, by what a call asks for
    "int8": ("triton_int8_int8", "reference"),
    "int8_fp8": ("triton_int8_fp8", "reference"),
    "int8_half": ("triton_int8", "reference"),
    "int4": ("reference",),
}
_LOADED: dict[str, "Backend"] = {}


@runtime_checkable
class Backend(Protocol):
    """Runs attention; knows nothing of methods, layers or models."""

    name: str

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Say, one sentence each, why this call cannot run here; empty when it can."""

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Whether dense attention would be at least as fast as this mask."""

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: attention over all keys."""

    @overload
    def block_sparse(self, call: AttentionCall, mask: BlockMask) -> torch.Tensor: ...

    @overload
    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return [B, S, H, D] over the kept pairs, and the log-sum-exp [B, S, H] when asked for."""


def backend_names() -> list[str]:
    """Return the names `choose` accepts, "auto" first."""
    return ["auto", *_MODULES]


def load(name: str) -> Backend:
    """Return the backend of that name; import errors become one `UnsupportedCall`."""
    if name not in _MODULES:
        raise UnsupportedCall(
            "unknown backend", expected=f"one of {', '.join(backend_names())}", got=repr(name)
        )
    if name not in _LOADED:
        module, kind = _MODULES[name]
        try:
            factory: Callable[[], Backend] = getattr(import_module(module), kind)
            _LOADED[name] = factory()
        except ImportError as error:
            raise UnsupportedCall(f"backend {name} cannot be loaded: {error}") from error
    return _LOADED[name]


def choose(name: str, call: AttentionCall, mask: BlockMask | None = None) -> Backend:
    """Return the first backend that fits the call.

    A named backend never falls back: when it does not fit, its reasons are the error. "auto" tries
    the backends of the device from the fastest on and lists every refusal when none fits.

    Raises:
        UnsupportedCall: nothing fits, with each reason.
    """
    names = (name,) if name != "auto" else _AUTO.get(call.query.device.type, ("reference",))
    if name == "auto" and call.quantize != "none" and call.query.device.type == "cuda":
        names = _QUANTISED[call.quantize]
    refusals = []
    for candidate in names:
        try:
            backend = load(candidate)
            reasons = backend.not_supported(call, mask)
        except UnsupportedCall as error:
            if name != "auto" and candidate not in _MODULES:
                raise
            reasons = [str(error)]
        if not reasons:
            return backend
        refusals.append(f"{candidate}: {', '.join(reasons)}")
    raise UnsupportedCall("no backend can run this call", got="; ".join(refusals))
