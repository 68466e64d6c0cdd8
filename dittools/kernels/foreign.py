"""Adapters to SageAttention, SpargeAttn, NATTEN and FlashAttention, where the user has them.

Each is chosen by name, is imported on first use, and says why it cannot run a call.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from dittools.call import AttentionCall
from dittools.errors import UnsupportedCall
from dittools.kernels.common import exact_only, from_slots, misfit, to_slots
from dittools.kernels.windows import Windows, windows_of
from dittools.mask import BlockMask

DEVICES = ("cuda",)
HALF = (torch.float16, torch.bfloat16)


def _common(call: AttentionCall, package: str, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Refusals every adapter shares: package, device, dtype, bias, gradients."""
    reasons = exact_only(package, call)
    if importlib.util.find_spec(package) is None:
        reasons.append(f"{package} is not installed")
    if call.query.device.type not in DEVICES:
        reasons.append(f"{package} runs on {DEVICES[0]}, got {call.query.device.type}")
    if call.query.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        reasons.append(f"{package} takes {wanted}, got {call.query.dtype}")
    if call.key_mask is not None or call.key_bias is not None:
        reasons.append(f"{package} takes no per-key mask or bias")
    return reasons


def _refuse(name: str, reasons: list[str]) -> None:
    if reasons:
        raise UnsupportedCall(f"backend {name} cannot run this call", got=", ".join(reasons))


class _DenseKernel(ABC):
    """A kernel that computes every pair; it runs a mask only when that keeps everything."""

    name: ClassVar[str]
    package: ClassVar[str]
    head_dims: ClassVar[str]

    @abstractmethod
    def _takes(self, head_dim: int) -> bool: ...

    @abstractmethod
    def _run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, S, H, D] and log-sum-exp [B, H, S]."""

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Package, device, dtype, head size; then whether the mask drops anything."""
        reasons = _common(call, self.package, HALF)
        if not self._takes(call.query.shape[-1]):
            reasons.append(
                f"{self.package} takes head_dim {self.head_dims}, got {call.query.shape[-1]}"
            )
        if mask is not None:
            reasons += misfit(call, mask)
            if not mask.is_whole:
                reasons.append(f"{self.package} computes every pair and this mask drops some")
        return reasons

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Always: it has no other form."""
        return True

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: attention over all keys by the named kernel."""
        _refuse(self.name, self.not_supported(call))
        return self._run(call)[0]

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return [B, S, H, D] for a mask that keeps everything, and the log-sum-exp [B, S, H]."""
        _refuse(self.name, self.not_supported(call, mask))
        out, lse = self._run(call)
        return (out, lse.transpose(1, 2)) if return_lse else out


class SageBackend(_DenseKernel):
    """SageAttention: INT8 scores with smoothed keys. Source: arXiv:2410.02367, arXiv:2411.10958."""

    name = "sage"
    package = "sageattention"
    head_dims = "up to 128"

    def _takes(self, head_dim: int) -> bool:
        return head_dim <= 128

    def _run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        kernel: Any = importlib.import_module(self.package)
        out, lse = kernel.sageattn(
            call.query, call.key, call.value,
            tensor_layout="NHD", is_causal=False, sm_scale=call.softmax_scale, return_lse=True,
        )  # fmt: skip
        return out, lse


class FlashBackend(_DenseKernel):
    """FlashAttention 2. Source: arXiv:2307.08691."""

    name = "flash"
    package = "flash_attn"
    head_dims = "up to 256 in steps of 8"

    def _takes(self, head_dim: int) -> bool:
        return head_dim <= 256 and head_dim % 8 == 0

    def _run(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        kernel: Any = importlib.import_module(self.package)
        out, lse, _ = kernel.flash_attn_func(
            call.query, call.key, call.value,
            softmax_scale=call.softmax_scale, causal=False, return_attn_probs=True,
        )  # fmt: skip
        return out, lse


class SpargeBackend:
    """SpargeAttn's block-sparse entry point: INT8 scores, FP8 values. Source: arXiv:2502.18137."""

    name = "sparge"
    package = "spas_sage_attn"

    def __init__(self) -> None:
        """Nothing is imported before the first call."""
        self._maps: WeakKeyDictionary[BlockMask, dict[object, torch.Tensor | str]]
        self._maps = WeakKeyDictionary()

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Package, device, dtype, sizes; then whether the mask fits the kernel's blocks."""
        reasons = _common(call, self.package, HALF)
        if call.query.shape[-1] not in (64, 128):
            reasons.append(f"{self.package} takes head_dim 64 or 128, got {call.query.shape[-1]}")
        if min(call.query.shape[1], call.key.shape[1]) < 128:
            reasons.append(f"{self.package} needs 128 tokens or more")
        if mask is not None:
            reasons += misfit(call, mask)
            if mask.tiles is not None:
                reasons.append(f"{self.package} keeps whole blocks and this mask cuts some")
            if mask.order is not None and mask.order.has_padding:
                reasons.append(f"{self.package} has no padding slots and this token order does")
            blocks = self._map(mask, call)
            reasons += [blocks] if isinstance(blocks, str) else []
        return reasons

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Never: whoever names it wants its arithmetic."""
        return False

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: the same kernel over all blocks."""
        mask = BlockMask.full(call.query.shape[1], call.key.shape[1], 128)
        out = self.block_sparse(call, mask)
        assert isinstance(out, torch.Tensor)
        return out

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return [B, S, H, D] over the kept blocks.

        Raises:
            UnsupportedCall: the call does not fit, or the log-sum-exp is asked for: the kernel's
                own is not the same in every release.
        """
        reasons = self.not_supported(call, mask)
        if return_lse:
            reasons.append(f"{self.package} returns no dependable log-sum-exp")
        _refuse(self.name, reasons)
        kernel: Any = importlib.import_module(self.package)
        slots, blocks = to_slots(call, mask), self._map(mask, call)
        assert isinstance(blocks, torch.Tensor)
        out = kernel.block_sparse_sage2_attn_cuda(
            slots.query, slots.key, slots.value,
            mask_id=blocks.expand(slots.query.shape[0], slots.query.shape[1], -1, -1).contiguous(),
            scale=call.softmax_scale, tensor_layout="HND",
        )  # fmt: skip
        return from_slots(out.to(call.query.dtype), mask)

    def _map(self, mask: BlockMask, call: AttentionCall) -> torch.Tensor | str:
        """The mask in the kernel's blocks, int8 [1, H or 1, Q, K], or why it has none; kept."""
        device = call.query.device
        want = (64, 128) if _is_hopper(device) else (128, 64)
        made = self._maps.setdefault(mask, {})
        wanted = (device, call.query.shape[1], call.key.shape[1])
        if wanted not in made:
            made[wanted] = _resize(mask, want, call.query.shape[1], call.key.shape[1], device)
        return made[wanted]


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _resize(
    mask: BlockMask, want: tuple[int, int], q_len: int, k_len: int, device: torch.device
) -> torch.Tensor | str:
    """Say a mask in other blocks where that is exact; else the reason it is not."""
    keep = mask.keep
    for axis, (own, wanted, length) in enumerate(
        ((mask.q_block, want[0], q_len), (mask.kv_block, want[1], k_len)), start=1
    ):
        if own % wanted == 0:
            keep = keep.repeat_interleave(own // wanted, dim=axis).narrow(
                axis, 0, -(-length // wanted)
            )
            continue
        theirs = f"{want[0]} x {want[1]}"
        return f"spas_sage_attn keeps blocks of {theirs}, the mask's are {mask.block_size}"
    if not bool(keep.any(-1).all()):
        return "spas_sage_attn needs a kept block in every row and some rows of this mask are empty"
    return keep[None].to(device, torch.int8)


class NattenBackend:
    """NATTEN's fused neighborhood attention, for window masks. Source: arXiv:2403.04690."""

    name = "natten"
    package = "natten"

    def __init__(self) -> None:
        """Nothing is imported before the first call."""
        self._windows: WeakKeyDictionary[BlockMask, dict[object, Windows | str]]
        self._windows = WeakKeyDictionary()

    def not_supported(self, call: AttentionCall, mask: BlockMask | None = None) -> list[str]:
        """Package, device, dtype; then whether the mask is a window on every axis."""
        reasons = _common(call, self.package, (*HALF, torch.float32))
        if call.key.shape[1] != call.query.shape[1]:
            reasons.append("natten takes as many keys as queries here")
        if mask is not None:
            fit = misfit(call, mask)
            found = self._found(call, mask) if not fit else ""
            reasons += fit or ([found] if isinstance(found, str) else [])
        return reasons

    def prefers_dense(self, call: AttentionCall, mask: BlockMask) -> bool:
        """Never: whoever names it wants its kernel."""
        return False

    def dense(self, call: AttentionCall) -> torch.Tensor:
        """Return [B, S, H, D]: windows as long as the axes."""
        _refuse(self.name, self.not_supported(call))
        axes = tuple(side for side in call.grid.shape if side > 1)
        if call.grid.text or not axes:
            _refuse(self.name, ["natten takes a grid of 2 tokens or more without text"])
        return self._run(call, Windows(axes, axes, (1,) * len(axes)))[0]

    def block_sparse(
        self, call: AttentionCall, mask: BlockMask, *, return_lse: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return [B, S, H, D] of the windows the mask stands for, and the log-sum-exp [B, S, H]."""
        _refuse(self.name, self.not_supported(call, mask))
        found = self._found(call, mask)
        assert isinstance(found, Windows)
        out, lse = self._run(call, found)
        return (out, lse) if return_lse else out

    def _found(self, call: AttentionCall, mask: BlockMask) -> Windows | str:
        made = self._windows.setdefault(mask, {})
        if call.grid not in made:
            made[call.grid] = windows_of(mask, call.grid)
        return made[call.grid]

    def _run(self, call: AttentionCall, windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
        natten: Any = importlib.import_module(self.package)
        kernel: Callable[..., Any] = getattr(natten, f"na{len(windows.axes)}d")
        batch, length, heads, head_dim = call.query.shape
        shape = (batch, *windows.axes, heads, head_dim)
        out, lse = kernel(
            call.query.reshape(shape), call.key.reshape(shape), call.value.reshape(shape),
            kernel_size=windows.window, stride=windows.stride, scale=call.softmax_scale,
            return_lse=True,
        )  # fmt: skip
        return out.reshape(call.query.shape), lse.reshape(batch, length, heads)
