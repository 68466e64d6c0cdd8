"""Sparse-vDiT: each head runs one of five patterns, fixed once for the whole run.

Source: arXiv:2506.03065; its repository holds no code, so block rounding, stripe columns and the
normalised loss are this project's. Band widths follow svg-project/Sparse-VideoGen, which the paper
names. In position order the first frame is spread over all blocks: the multi-diagonal has no sink.
Difference: the chooser leaves heads out only if told (`skip`), and where it runs, at the first
sparse step, it fixes the patterns of all later ones; the paper searches every step beforehand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.bands import band_mask, stripe_mask
from dittools.methods.base import attend_masked, bad_param, check_params, param
from dittools.methods.placing import sent

MODES = ("full", "skip", "diagonal", "multi_diagonal", "stripe")
_CHUNK = {True: 2**17, False: 2**26}  # elements whose error is taken at a time: on a CPU, elsewhere


@dataclass(frozen=True)
class SparseVDiT:
    """One pattern per head: full, skip, diagonal, multi-diagonal or vertical stripes."""

    name: ClassVar[str] = "sparse_vdit"
    mode: str | tuple[str, ...] = param(
        "auto", "the pattern of all heads, or one per head; 'auto' chooses at the first sparse step"
    )
    density: float = param(0.25, "the share kept by each sparse pattern", above=0.0, most=1.0)
    block_size: int = param(128, "the tokens per block", least=8, most=1024)
    sink: bool = param(False, "whether the diagonal pattern also keeps the whole first frame")
    stripes: tuple[float, ...] = param(
        (),
        "the stripe columns as shares of the grid's tokens, best first; empty spaces them evenly",
    )
    penalty: float = param(0.5, "'auto': the weight of the computed share in the loss", least=0.0)
    threshold: float = param(
        1.0,
        "'auto': the loss above which a pattern is refused; lower keeps more heads full",
        least=0.0,
    )
    skip: bool = param(False, "'auto': whether a head may be left out altogether")

    def __post_init__(self) -> None:
        """Check modes and stripe positions."""
        check_params(self)
        modes = self.mode if isinstance(self.mode, tuple) else (self.mode,)
        if not modes or any(m not in MODES and (m != "auto" or len(modes) > 1) for m in modes):
            expected = f"'auto', or one of {', '.join(MODES)}, once or per head"
            raise bad_param(self, "mode", expected=expected)
        if not all(isinstance(s, (int, float)) and 0 <= s <= 1 for s in self.stripes):
            raise bad_param(self, "stripes", expected="shares from 0 to 1")

    def not_supported(self, call: AttentionCall) -> list[str]:
        """A list of modes must have one entry per head."""
        heads = call.method_heads
        if isinstance(self.mode, tuple) and len(self.mode) != heads:
            return [f"sparse_vdit lists {len(self.mode)} modes, the call has {heads} heads"]
        return []

    def mask(self, grid: TokenGrid, mode: str = "") -> BlockMask:
        """Return the mask of one sparse mode, by default the method's own; cached."""
        mode = mode or (self.mode if isinstance(self.mode, str) else self.mode[0])
        if mode == "stripe":
            return stripe_mask(grid, self.density, self.block_size, self.stripes)
        if mode in ("diagonal", "multi_diagonal"):
            by_position = mode == "multi_diagonal"
            return band_mask(
                grid, self.density, self.block_size, by_position, self.sink and not by_position
            )
        return BlockMask.full(grid.total, grid.total, self.block_size)

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D]; heads that share a mode run as one launch."""
        if isinstance(self.mode, tuple):
            return self._attend_modes(call, backend, [self.mode[place] for place in call.places])
        if self.mode != "auto":
            return self._attend_mode(call, backend, self.mode)
        modes = call.memory.get(self._key(call))
        if modes is not None:
            return self._attend_modes(call, backend, modes)
        call.memory[self._key(call)], out = choose_modes(call, backend, self)
        return out

    def left_out(self, call: AttentionCall) -> tuple[int, ...]:
        """Return the heads of a call that are zero on purpose; 'auto' knows once it chose."""
        modes: Sequence[str] = call.memory.get(self._key(call), ())
        if self.mode != "auto":
            per_head = isinstance(self.mode, tuple)
            modes = [self.mode[at] if per_head else str(self.mode) for at in call.places]
        return tuple(head for head, mode in enumerate(modes) if mode == "skip")

    def _key(self, call: AttentionCall) -> str:
        return f"sparse_vdit {self} {call.grid} {call.head_count}"

    def _attend_mode(self, call: AttentionCall, backend: Backend, mode: str) -> torch.Tensor:
        if mode == "full":
            return backend.dense(call)
        if mode == "skip":
            return torch.zeros_like(call.query)
        return attend_masked(call, backend, self.mask(call.grid, mode).to(call.query.device))

    def _attend_modes(
        self, call: AttentionCall, backend: Backend, modes: Sequence[str]
    ) -> torch.Tensor:
        groups = {m: [h for h, mode in enumerate(modes) if mode == m] for m in MODES}
        used = [(m, heads) for m, heads in groups.items() if heads]
        if len(used) == 1:
            return self._attend_mode(call, backend, used[0][0])
        out = torch.zeros_like(call.query)
        for mode, heads in used:
            if mode != "skip":
                where = sent(torch.tensor(heads), out.device)
                out.index_copy_(2, where, self._attend_mode(call.heads(heads), backend, mode))
        return out


def mode_losses(call: AttentionCall, backend: Backend, method: SparseVDiT) -> torch.Tensor:
    """Return float64 [modes, H]: error of every mode plus penalty * computed share; full is inf.

    The error is the squared distance to dense attention over the mean squared norm of the layer's
    heads, so that dropping a weak head is cheap. The paper's algorithm writes the penalty with the
    opposite sign, which would reward dense modes; its equation is used.
    """
    return _try_modes(call, backend, method)[0]


def choose_modes(
    call: AttentionCall, backend: Backend, method: SparseVDiT
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Return each head's mode of least loss, full where all losses exceed the threshold, and the
    output of those modes, which is what later layers see in the paper's search.
    """
    losses, outputs = _try_modes(call, backend, method)
    best = losses.argmin(dim=0)
    best[losses.min(dim=0).values > method.threshold] = 0
    modes = tuple(MODES[place] for place in best.tolist())
    if len(set(modes)) == 1:
        return modes, outputs[modes[0]] if modes[0] in outputs else torch.zeros_like(call.query)
    chosen = torch.zeros_like(call.query)
    for mode, out in outputs.items():
        heads = [head for head, one in enumerate(modes) if one == mode]
        if heads:
            where = sent(torch.tensor(heads), out.device)
            chosen.index_copy_(2, where, out.index_select(2, where))
    return modes, chosen


def _try_modes(
    call: AttentionCall, backend: Backend, method: SparseVDiT
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the losses and the outputs of all modes but skip, whose output is zero."""
    dense = backend.dense(call)
    outputs = {"full": dense}
    norm = call.of_all_heads(_energy(dense)).mean().clamp(min=1e-30)
    losses = torch.full((len(MODES), call.head_count), float("inf"), dtype=torch.float64)
    if method.skip:
        losses[1] = (_energy(dense) / norm).cpu()
    for place, mode in enumerate(MODES[2:], start=2):
        outputs[mode] = method._attend_mode(call, backend, mode)
        error = (_energy(outputs[mode], dense) / norm).cpu()
        losses[place] = error + method.penalty * method.mask(call.grid, mode).computed
    return losses, outputs


def _energy(out: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """Return float64 [H]: the squared norm of every head of [B, S, H, D], or of a difference.

    Squares of a token's channels are summed in float32, or wider for wider tensors, and tokens in
    float64; a few tokens at a time, so that what is in between stays in a CPU's cache.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    step = max(1, _CHUNK[out.device.type == "cpu"] // out[:, 0].numel())
    total = torch.zeros(out.shape[2], dtype=torch.float64, device=out.device)
    for first in range(0, out.shape[1], step):
        part = out[:, first : first + step].to(wide)
        if other is not None:
            part = part - other[:, first : first + step].to(wide)
        total += part.square().sum(3).sum((0, 1), dtype=torch.float64)
    return total


def expand_modes(modes: Sequence[str], method: SparseVDiT) -> list[tuple[list[int], SparseVDiT]]:
    """Return (heads, method) per mode in use: what a plan stores as one rule each."""
    return [
        ([h for h, m in enumerate(modes) if m == mode], replace(method, mode=mode))
        for mode in MODES
        if mode in modes
    ]
