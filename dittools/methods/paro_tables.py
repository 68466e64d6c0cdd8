"""Calibrated orders and masks of PAROAttention, one bit per block, as a safetensors file."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dittools.call import AttentionCall
from dittools.errors import PlanError
from dittools.grid import TokenGrid
from dittools.mask import BlockMask, pack_bits, unpack_bits
from dittools.reading import misfit, parse_json, read_tensors

_FORMAT = "dittools-paro"
_SHAPE = {
    "grid": [int],
    "block_size": int,
    "bin_of_step": [int],
    "orders": torch.Tensor,
    "masks": torch.Tensor,
}


@dataclass(frozen=True, eq=False)
class ParoTables:
    """Orders per (layer, head) and block masks per (bin of steps, layer, head).

    Attributes:
        grid: the grid they were made for. The masks are over its frames, height and width alone, so
            they serve calls with text of any length, which is kept whole.
        block_size: tokens.
        orders: int64 [layers, heads].
        packed: uint8 [bins, layers, heads, ceil(blocks ** 2 / 8)].
        bin_of_step: bin of every calibrated step; other step counts map by relative position.
    """

    grid: TokenGrid
    block_size: int
    orders: torch.Tensor
    packed: torch.Tensor = field(repr=False)
    bin_of_step: tuple[int, ...]
    cache: dict[Any, tuple[int, BlockMask]] = field(default_factory=dict, repr=False)

    @staticmethod
    def pack(
        grid: TokenGrid,
        block_size: int,
        orders: torch.Tensor,
        masks: torch.Tensor,
        layers: list[int],
        bins: list[int],
    ) -> "ParoTables":
        """Return tables from bool [bins, layers, heads, blocks, blocks] of the grid's tokens."""
        if layers != list(range(len(layers))):
            raise PlanError(
                "the calibration did not see every layer",
                expected=f"layers 0 to {max(layers)}",
                got=str(layers),
            )
        packed = pack_bits(masks.flatten(3))
        return ParoTables(grid, block_size, orders, packed, tuple(bins))

    @property
    def blocks(self) -> int:
        """Blocks of the grid's tokens."""
        return -(-self.grid.tokens // self.block_size)

    def misfit(self, call: AttentionCall) -> list[str]:
        """Say why the tables do not fit a call; empty when they do."""
        grid, layer, heads, reasons = call.grid, call.layer, call.head_count, []
        known = self.orders.shape[1]
        if grid.shape != self.grid.shape:
            reasons.append(f"paro tables are for {self.grid}, the call has {grid}")
        if layer >= len(self.orders):
            reasons.append(f"paro tables have {len(self.orders)} layers, the call is layer {layer}")
        if not call.head_index and heads != known:
            reasons.append(f"paro tables have {known} heads, the call has {heads}")
        if call.head_index and max(call.head_index) >= known:
            reasons.append(f"paro tables have {known} heads, not one {max(call.head_index)}")
        return reasons

    def index(self, step: int, steps: int) -> int:
        """Return the bin of a step, by relative position when the run has another step count."""
        known = len(self.bin_of_step)
        place = step * known // steps if steps else step
        return self.bin_of_step[min(place, known - 1)]

    def mask(self, layer: int, index: int, grid: TokenGrid | None = None) -> torch.Tensor:
        """Return bool [heads, all blocks, all blocks] of one layer and bin, text not yet kept.

        Args:
            layer: of the call.
            index: bin.
            grid: of the call, whose text may be of another length; None for the calibrated one.
        """
        video = unpack_bits(self.packed[index, layer], self.blocks**2)
        total = (grid or self.grid).blocks(self.block_size)
        out = torch.zeros((len(video), total, total), dtype=torch.bool)
        out[:, : self.blocks, : self.blocks] = video.view(-1, self.blocks, self.blocks)
        return out

    def to_param(self) -> dict[str, Any]:
        """Return JSON values and tensors, `of_param` takes them back."""
        return {
            "grid": [*self.grid.shape, self.grid.text_before, self.grid.text_after],
            "block_size": self.block_size,
            "bin_of_step": list(self.bin_of_step),
            "orders": self.orders.to(torch.uint8),
            "masks": self.packed,
        }

    @staticmethod
    def of_param(param: dict[str, Any]) -> "ParoTables":
        """Return the tables of what `to_param` gave.

        Raises:
            PlanError: a part is missing or does not fit the others.
            InputError: the grid is none.
        """
        wrong = misfit(param, _SHAPE, "paro tables")
        if wrong:
            raise PlanError("paro tables are malformed", got=wrong)
        grid, size, bins = param["grid"], param["block_size"], param["bin_of_step"]
        orders, masks = param["orders"], param["masks"]
        if len(grid) != 5 or not size >= 1 or not bins or min(bins) < 0 or orders.dim() != 2:
            raise PlanError(
                "paro tables are malformed",
                expected="5 numbers of a grid, a block size, bins of steps, orders [layers, heads]",
                got=f"{grid}, {size}, {bins[:8]}, {list(orders.shape)}",
            )
        made = ParoTables(TokenGrid(*grid), size, orders.long(), masks, tuple(bins))
        want = (max(bins) + 1, *orders.shape, -(-(made.blocks**2) // 8))
        kinds = {orders.dtype, masks.dtype}
        if tuple(masks.shape) != want or kinds != {torch.uint8} or bool((orders > 5).any()):
            raise PlanError(
                "paro tables do not fit their grid",
                expected=f"masks {want} and orders from 0 to 5, both bytes",
                got=f"{tuple(masks.shape)}, {masks.dtype}, {orders.dtype}",
            )
        return made

    def save(self, path: str | Path) -> None:
        """Write the tables as safetensors, with the grid in its header."""
        from safetensors.torch import save_file

        header = {
            "format": _FORMAT,
            "grid": json.dumps([*self.grid.shape, self.grid.text_before, self.grid.text_after]),
            "block_size": str(self.block_size),
            "bin_of_step": json.dumps(self.bin_of_step),
        }
        tensors = {"orders": self.orders.to(torch.uint8), "masks": self.packed}
        save_file({k: t.contiguous() for k, t in tensors.items()}, str(path), header)


def load_tables(path: str | Path) -> ParoTables:
    """Return the tables of a file; read once while the file does not change.

    Raises:
        PlanError: the file is missing, damaged or of another kind.
    """
    try:
        changed = Path(path).stat().st_mtime_ns
    except (OSError, ValueError) as error:  # a name that no file can have is no OSError
        raise PlanError(f"paro tables cannot be read: {error}") from error
    return _load(str(path), changed)


@lru_cache(maxsize=8)
def _load(path: str, changed: int) -> ParoTables:
    try:
        tensors, header = read_tensors(path)
    except (OSError, ValueError) as error:
        raise PlanError(f"paro tables {path} are damaged", got=str(error)) from error
    if header.get("format") != _FORMAT:
        raise PlanError(
            f"{path} holds no paro tables", expected=_FORMAT, got=repr(header.get("format"))
        )
    try:
        param = {name: parse_json(header[name]) for name in ("grid", "block_size", "bin_of_step")}
    except (KeyError, ValueError) as error:
        raise PlanError(f"paro tables {path} are malformed", got=repr(error)) from error
    return ParoTables.of_param({**param, **tensors})
