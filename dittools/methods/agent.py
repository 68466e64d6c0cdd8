"""Agent attention: a few pooled queries gather from all keys, and every query reads from them.

With A the m agents and s the scale of the scores,
    O = softmax(Q A^T s^e) softmax(A K^T s) V + k V,    e = 0.3, k = 0.075,
which costs 2 m / N of dense attention. Source: arXiv:2312.08874 and LeapLabTHU/Agent-Attention
(agentsd). `agents="matched"` is the authors' version for Stable Diffusion: agents are a coarse
clustering of the block's input by token merging, a finer one shortens query, key and value, and
after the early steps plain token merging goes on. `agents="pooled"` carries the idea over to
diffusion transformers, where the authors have none: agents are means over cells of the query before
RoPE, at the length of a typical query of the cell, turned to the cell's centre. Text tokens are
agents of their own, so their rows are exact.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.methods.base import bad_param, check_params, param
from dittools.methods.merging import merge, unmerge
from dittools.methods.rotation import centre_phases, turn
from dittools.methods.tome import (
    ToMe,
    matching,
    merge_call,
    rebuild,
    refused,
    text_part,
    video_part,
)

UNKNOWN_LENGTH = 50  # steps assumed where their number is not known, the authors' count


@dataclass(frozen=True)
class Agent:
    """Two small attentions through agent tokens instead of a large one, in the early steps."""

    name: ClassVar[str] = "agent"
    acts_early: ClassVar[bool] = True
    agents: str = param(
        "pooled",
        "pooled: means over cells, for transformers; matched: by token merging, for UNets",
        choices=("pooled", "matched"),
    )
    cell: tuple[int, int, int] = param(
        (1, 4, 4), "the tokens that make an agent: frames, rows and columns"
    )
    early: float = param(0.4, "the share of the steps that run with agents", above=0.0, most=1.0)
    late: str = param(
        "dense", "what runs in the later steps: dense, or tome", choices=("dense", "tome")
    )
    ratio: float = param(
        0.4, "matched, tome: the share of tokens that are merged", least=0.0, most=1.0
    )
    agent_ratio: float = param(
        0.95, "matched: the share of tokens merged away to make the agents", least=0.0, most=1.0
    )
    exponent: float = param(
        0.3, "the exponent of the second softmax's scale; 1 is the usual scale", least=0.0, most=4.0
    )
    shortcut: float = param(0.075, "the share of each token's own value that is added", least=0.0)
    random: bool = param(True, "matched: cells draw their fixed token anew, else it is the first")
    seed: int = param(0, "the start of the random numbers", least=0, most=2**40)
    max_downsample: int = param(
        1, "matched: the coarsest level of a UNet that takes part: 1 is full resolution", least=1
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_params(self)
        cell: Any = self.cell
        if not isinstance(cell, tuple) or len(cell) != 3:
            raise bad_param(self, "cell", expected="three whole numbers of at least 1")
        if not all(type(side) is int and side >= 1 for side in cell):
            raise bad_param(self, "cell", expected="three whole numbers of at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        """What a pipeline has to hand over besides query, key and value."""
        matched = ("features",) if self.agents == "matched" or self.late == "tome" else ()
        return matched + (("unrotated",) if self.agents == "pooled" else ())

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Extra keys belong to no token, and coarser levels of a UNet keep dense attention."""
        if self.agents == "matched":
            return refused(self.name, call, self.max_downsample)
        if call.key.shape[1] != call.grid.total:
            return ["agent has no shortcut for extra keys"]
        return []

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return [B, S, H, D] in the dtype of call.query."""
        if not self.is_early(call.step, call.steps):
            if self.late == "tome":
                later = ToMe(self.ratio, 2, self.random, self.seed, self.max_downsample)
                return later.attend(call, backend)
            return backend.dense(call)
        if self.agents == "matched":
            return self._matched(call, backend)
        return self._pooled(call, backend)

    def is_early(self, step: int, steps: int) -> bool:
        """Whether agents run at a step: 20 of the authors' 50."""
        return step < math.ceil(self.early * (steps or UNKNOWN_LENGTH) - 1e-9)

    def _matched(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Run the authors' version for UNets."""
        found = matching(call, self.cell[1:], self.random, self.seed)
        if found is None:
            return backend.dense(call)
        count, spent = found.most(self.ratio), found.most(self.agent_ratio)
        tokens = call.grid.tokens
        if 2 * (tokens - spent) >= tokens - count:  # too many agents to pay
            if count == 0:
                return backend.dense(call)
            out = backend.dense(merge_call(call, found, count))
            return rebuild(call, unmerge(out, found, count), backend)
        agents = merge(video_part(call.query, call.grid), found, spent)
        out = self._through(merge_call(call, found, count), agents, backend)
        return rebuild(call, unmerge(out, found, count), backend)

    def _through(self, call: AttentionCall, agents: torch.Tensor, backend: Backend) -> torch.Tensor:
        """Return the rows of call.query, read from agents [B, m, H, D]; text is only gathered."""
        gathered = backend.dense(_asked(call, agents))
        out = self._read(call, call.query, agents, gathered, None, backend)
        return out + self.shortcut * call.value[:, : out.shape[1]]

    def _pooled(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Run agents that are means over cells, and one for each text token."""
        grid = call.grid
        cell = tuple(min(c, side) for c, side in zip(self.cell, grid.shape, strict=True))
        count = math.prod(-(-side // c) for side, c in zip(grid.shape, cell, strict=True))
        asked = count + grid.text
        if asked * (grid.total + grid.tokens) >= grid.total**2:  # agents would not pay
            return backend.dense(call)
        agents = torch.cat((self._pool(call, cell), text_part(call.query, grid)), 1)
        gathered = backend.dense(_asked(call, agents))
        bias = call.additive_mask()
        if bias is not None:  # padding is no agent either
            text = text_part(bias.transpose(1, 2), grid).transpose(1, 2)
            bias = torch.cat((bias.new_zeros((*bias.shape[:2], count)), text), 2)
        query = video_part(call.query, grid)
        video = self._read(call, query, agents, gathered, bias, backend)
        video = video + self.shortcut * video_part(call.value, grid)
        before, after = gathered[:, count:].split((grid.text_before, grid.text_after), 1)
        return torch.cat((before, video, after), 1)

    def _read(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        agents: torch.Tensor,
        gathered: torch.Tensor,
        bias: torch.Tensor | None,
        backend: Backend,
    ) -> torch.Tensor:
        """Return what queries read from the agents: the second softmax."""
        return backend.dense(
            replace(
                call,
                query=query,
                key=agents,
                value=gathered,
                grid=TokenGrid(1, 1, query.shape[1]),
                scale=call.softmax_scale**self.exponent,
                key_mask=None,
                key_bias=bias,
                features=None,
                unrotated=None,
            )
        )

    def _pool(self, call: AttentionCall, cell: tuple[int, ...]) -> torch.Tensor:
        """Return the agents of the grid's tokens, [B, m, H, D], rotated to their cells' centres."""
        rotated = video_part(call.query, call.grid)
        plain = rotated if call.unrotated is None else call.unrotated
        length = cell_mean(plain.float().norm(dim=-1, keepdim=True), call.grid, cell)
        mean = cell_mean(plain.float(), call.grid, cell)
        mean = mean * (length / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        if call.unrotated is not None:
            key = f"agent phases {cell} {call.grid}"
            if key not in call.memory:
                call.memory[key] = centre_phases(
                    plain, rotated, lambda x: cell_mean(x, call.grid, cell)
                )
            mean = turn(mean, call.memory[key])
        return mean.to(call.query.dtype)


def cell_mean(tokens: torch.Tensor, grid: TokenGrid, cell: tuple[int, ...]) -> torch.Tensor:
    """Return [B, m, ...]: means over cells of [B, grid.tokens, ...]; cells at a border are smaller.

    Cells are ordered as the grid's tokens are.
    """
    batch, rest = tokens.shape[0], tokens.shape[2:]
    out = tokens.reshape(batch, *grid.shape, -1)
    for axis, size in enumerate(cell, start=1):
        out = _axis_mean(out, axis, size)
    return out.reshape(batch, -1, *rest)


def _axis_mean(tokens: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Return the means over runs of `size` along an axis; the last run may be shorter."""
    length = tokens.shape[axis]
    whole = length // size * size
    parts = []
    if whole:
        parts.append(tokens.narrow(axis, 0, whole).unflatten(axis, (-1, size)).mean(axis + 1))
    if whole < length:
        parts.append(tokens.narrow(axis, whole, length - whole).mean(axis, keepdim=True))
    return torch.cat(parts, axis)


def _asked(call: AttentionCall, agents: torch.Tensor) -> AttentionCall:
    """Return the call in which the agents gather: the first softmax."""
    grid = TokenGrid(1, 1, agents.shape[1])
    return replace(call, query=agents, grid=grid, features=None, unrotated=None)
