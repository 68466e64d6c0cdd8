"""FreeSwim's window alone: all frames of a box as large as the frame the model was trained on.

Source: arXiv:2511.14712 and WillWu111/FreeSwim (attention_processor_.py). The inward window equals
neighborhood attention at stride 1. This is the window-only mode, which may repeat what the prompt
asks for; `dittools.pipelines.freeswim` adds the second lane that keeps the content single.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.methods.base import attend_by_grid, bad_param, check_params, param
from dittools.methods.gna import GNA, gna_mask


@dataclass(frozen=True)
class FreeSwim:
    """A spatial window of the training size around each query, moved inward at the borders."""

    name: ClassVar[str] = "freeswim"
    differs_on_purpose: ClassVar[bool] = True  # far from dense is no fault
    native: tuple[int, int] = param(
        (30, 52), "the frame the model was trained on, (height, width) in tokens"
    )
    attn_temperature: float | None = param(
        None, "the factor on the scores of video tokens; None: sqrt(log 2N / log N), N = native"
    )
    block_size: int = param(128, "the tokens per computed block", least=8, most=1024)

    def __post_init__(self) -> None:
        """Check the pair and the factor."""
        check_params(self)
        sides: Any = self.native
        factor: Any = self.attn_temperature
        is_pair = isinstance(sides, tuple) and len(sides) == 2
        if not is_pair or not all(type(side) is int and side >= 1 for side in sides):
            raise bad_param(self, "native", expected="two whole numbers of at least 1")
        if factor is None and sides == (1, 1):
            raise bad_param(self, "attn_temperature", expected="a number, as log 1 is 0")
        if type(factor) is int:
            factor = float(factor)
            object.__setattr__(self, "attn_temperature", factor)
        if factor is not None and (type(factor) is not float or not 0 < factor < math.inf):
            raise bad_param(self, "attn_temperature", expected="a number above 0, or nothing")

    @property
    def temperature(self) -> float:
        """The factor on the scores, resolved."""
        if self.attn_temperature is not None:
            return self.attn_temperature
        return default_temperature(*self.native)

    @property
    def window(self) -> tuple[int, int]:
        """The window in tokens (height, width): odd, so one more than an even native side."""
        height, width = self.native
        return 2 * (height // 2) + 1, 2 * (width // 2) + 1

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Every grid fits: an axis no longer than the window is seen whole."""
        return []

    def remarks(self) -> list[str]:
        """Say what a report must know: a frame of the native size is changed as well."""
        if self.temperature == 1.0:
            return []
        factor = f"{self.temperature:.3f}"
        return [f"freeswim multiplies the scores of video tokens by {factor} at every size"]

    def mask(self, grid: TokenGrid) -> BlockMask:
        """Return the mask of one grid, exact to the token, the same for all heads; cached."""
        return gna_mask(grid, GNA(("full", *self.window), stride=1, block_size=self.block_size))

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query; text rows keep the model's own scale.

        The mask runs even where dense attention would be faster: it is there for the picture.
        """
        if self.temperature == 1.0:
            return attend_by_grid(self, call, backend, exactly=True)
        scaled = replace(call, scale=call.softmax_scale * self.temperature)
        out = attend_by_grid(self, scaled, backend, exactly=True)
        grid = call.grid
        parts = (0, grid.text_before), (grid.total - grid.text_after, grid.text_after)
        for start, count in parts:
            if count:
                query = call.query.narrow(1, start, count)
                text = backend.dense(replace(call, query=query, grid=TokenGrid(1, 1, count)))
                out.narrow(1, start, count).copy_(text)
        return out


def default_temperature(height: int, width: int) -> float:
    """Return the factor on the scores for a native frame of height x width tokens, 2 or more."""
    tokens = height * width
    return math.sqrt(math.log(2 * tokens) / math.log(tokens))


def attention_cost(grid: TokenGrid, native: tuple[int, int], interval: int | None) -> float:
    """Return the attention of one guided step over that of dense refinement (two full calls).

    Args:
        grid: of the target size.
        native: frame the model was trained on, (height, width) in tokens.
        interval: steps between two refreshes of the text features; None runs both lanes always.
    """
    window = FreeSwim(native, attn_temperature=1.0).window
    kept = math.prod(min(w, side) / side for w, side in zip(window, grid.shape[1:], strict=True))
    units = 2 * (1 + kept) if interval is None else 2 * kept + 1 / interval
    return units / 2
