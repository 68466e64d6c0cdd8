"""The probe: rides along one generation and measures every candidate on the true q, k and v."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dittools.call import AttentionCall
from dittools.grid import TokenGrid
from dittools.kernels import Backend
from dittools.mask import BlockMask
from dittools.searching.atlas import BANDS, MAP_SIDE, band_keys, small_map
from dittools.searching.candidates import Candidate
from dittools.searching.rows import mask_rows, masked_output, sample_rows
from dittools.searching.rowwise import RowBackend

BRANCHES = ("cond", "uncond", "")
CHUNK = 128  # query rows looked at together
MEMORY_BYTES = 2**28  # up to which candidates may remember their choices from step to step
_OTHER_SEED = 2**41  # of the rows looked at in calls of another size; no method draws its rows so


@dataclass(frozen=True)
class Sites:
    """What is measured where.

    Attributes:
        grid: geometry of the main attention. Calls of another one (a prompt of another length, an
            attention beside the text, a level of a U-Net) are looked at too, at rows of their own.
        layers, heads: of the model.
        ranges: edges of the step ranges as shares of the run, 0 first and 1 last.
        steps: of the run.
        sampled: steps that are looked at; the others pass.
        rows: int64 [R], queries that are looked at in calls of the main grid.
        passed: guidance branches that are not looked at.
    """

    grid: TokenGrid
    layers: int
    heads: int
    ranges: tuple[float, ...]
    steps: int
    sampled: frozenset[int]
    rows: torch.Tensor
    passed: frozenset[str] = frozenset()

    def range_of(self, step: int) -> int:
        """Return the step range that holds a step."""
        inside = [r for r, edge in enumerate(self.ranges[:-1]) if edge <= step / self.steps]
        return inside[-1]

    @property
    def range_steps(self) -> list[int]:
        """Steps of the run in each range."""
        found = [self.range_of(step) for step in range(self.steps)]
        return [found.count(r) for r in range(len(self.ranges) - 1)]


class Probe:
    """A method that answers dense and notes what each candidate would have done instead.

    Args:
        sites: what to look at.
        candidates: dense first.
        gains: [H, D, D] per layer, the output projection of each head as a quadratic form; errors
            are measured behind it. None counts errors of the head's own output.
        carry: weight of the density in Sparse-vDiT's greedy choice; the chosen candidates' output
            is passed on, so that later layers and steps see their error. None passes dense on.
        active: numbers of the candidates to measure; None takes all.
    """

    name: ClassVar[str] = "probe"

    def __init__(
        self,
        sites: Sites,
        candidates: Sequence[Candidate],
        gains: Sequence[torch.Tensor | None],
        carry: float | None = None,
        active: Sequence[int] | None = None,
    ) -> None:
        """Make room for the sums."""
        self.sites, self.candidates, self.gains, self.carry = sites, candidates, gains, carry
        count = len(candidates)
        self.active = [n for n in (range(count) if active is None else active) if n]
        self._rows: dict[TokenGrid, torch.Tensor] = {sites.grid: sites.rows}
        self._masks: dict[tuple[int, TokenGrid], BlockMask] = {}
        self._kept: dict[tuple[int, TokenGrid], torch.Tensor] = {}
        self._memory: dict[tuple[int, str, int, int], dict[str, object]] = {}
        shape = (sites.layers, len(sites.ranges) - 1, len(BRANCHES), sites.heads)
        self._side = side = min(MAP_SIDE, sites.grid.total)
        self.error = torch.zeros((*shape, count), dtype=torch.float64)
        self.density = torch.zeros((*shape, count), dtype=torch.float64)
        self.computed = torch.zeros((*shape, count), dtype=torch.float64)
        self.norm = torch.zeros(shape, dtype=torch.float64)
        self.calls = torch.zeros(shape[:3], dtype=torch.float64)
        self.bands = torch.zeros((*shape[:2], sites.heads, len(BANDS)), dtype=torch.float64)
        self.maps = torch.zeros((*shape[:2], sites.heads, side, side), dtype=torch.float32)

    def not_supported(self, call: AttentionCall) -> list[str]:
        """Every call can be watched."""
        return []

    def results(self) -> dict[str, torch.Tensor]:
        """Return what was measured, sums over calls, by name."""
        names = ("error", "norm", "calls", "density", "computed", "bands", "maps")
        return {name: getattr(self, name).clone() for name in names}

    def attend(self, call: AttentionCall, backend: Backend) -> torch.Tensor:
        """Return dense attention, or what the greedy choice gives when errors are carried on."""
        out = backend.dense(call)
        if call.step not in self.sites.sampled or call.branch in self.sites.passed:
            return out
        if call.head_count != self.sites.heads:
            return out  # nothing is known of this layer then, and plans leave it dense
        where = (call.layer, self.sites.range_of(call.step), BRANCHES.index(_branch(call)))
        before = self.density[where].clone()
        error, norm = self._measure(call, backend, where)
        self.error[where] += error
        self.norm[where] += norm
        self.calls[where] += 1
        if self.carry is None:
            return out
        kept = self.density[where] - before
        kept[:, 0] = 1.0
        return self._chosen(call, backend, out, error / norm.mean().clamp(min=1e-30), kept)

    def _measure(
        self, call: AttentionCall, backend: Backend, where: tuple[int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean squared errors [H, C] and mean squared norms [H] over the sampled queries.

        All candidates share the scores of the sampled queries; of one that looks at query and key,
        only those queries are worked out.
        """
        rows, gain = self._rows_in(call.grid), self.gains[call.layer]
        heads, batch = call.head_count, call.query.shape[0]
        error = torch.zeros((heads, len(self.candidates)), dtype=torch.float64)
        norm = torch.zeros(heads, dtype=torch.float64)
        for part in range(0, len(rows), CHUNK):
            some = rows[part : part + CHUNK]
            sampled = RowBackend(backend, call, some)
            share = batch * len(rows)
            dense = []
            for item, (weight, _) in enumerate(sampled.weights(call)):
                value = call.value[item].transpose(0, 1).float()
                dense.append(weight @ value / weight.sum(dim=-1, keepdim=True))
                self._note_shape(call, weight, some)
                norm += _size(dense[item], gain) / share
            for number in self.active:
                candidate = self.candidates[number]
                if candidate.mask is None:
                    others = self._dynamic(number, call, sampled, part)
                    if part == 0:
                        self.density[where][:, number] += sampled.kept
                        self.computed[where][:, number] += sampled.visited
                elif candidate.method.not_supported(call):
                    others = self._impossible(call, len(some))
                else:
                    kept = self._rows_of(number, call.grid)[:, part : part + CHUNK].to(
                        call.query.device
                    )
                    values = [v.transpose(0, 1).float() for v in call.value]
                    pairs = zip(sampled.weights(call), values, strict=True)
                    others = [masked_output(weight, kept, value) for (weight, _), value in pairs]
                for other, exact in zip(others, dense, strict=True):
                    error[:, number] += _size(other - exact, gain) / share
        self._note_fixed(where, call.grid)
        return error.nan_to_num(nan=float("inf"), posinf=float("inf")), norm

    def _dynamic(
        self, number: int, call: AttentionCall, sampled: RowBackend, part: int
    ) -> list[torch.Tensor]:
        """Return per item [H, R, D] of a candidate that looks at query and key."""
        at = self._rows_in(call.grid)[part : part + CHUNK].to(call.query.device)
        method = self.candidates[number].method
        sampled.forget()
        use = replace(call, memory=self._remembered(call, number, part))
        if method.not_supported(use):
            return self._impossible(call, len(at))
        out = method.attend(use, sampled)
        return [part[at].transpose(0, 1).float() for part in out]

    def _impossible(self, call: AttentionCall, rows: int) -> list[torch.Tensor]:
        """Return per item [H, R, D] of a candidate that cannot run a call."""
        shape = (call.head_count, rows, call.query.shape[3])
        return [torch.full(shape, float("inf"), device=call.query.device)] * len(call.query)

    def _remembered(self, call: AttentionCall, number: int, part: int) -> dict[str, object]:
        """Return what a candidate remembers of a site and branch, as in a run; if there is room.

        Rows looked at together have a memory of their own: a call seen once per chunk of rows must
        not count as an earlier call of itself.
        """
        blocks = self.sites.grid.total / 32
        held = blocks**2 * self.sites.heads * self.sites.layers * 2 * len(self.active)
        held *= -(-len(self.sites.rows) // CHUNK)
        if held > MEMORY_BYTES:
            return {}
        return self._memory.setdefault((call.layer, _branch(call), number, part), {})

    def _note_fixed(self, where: tuple[int, int, int], grid: TokenGrid) -> None:
        for number in self.active:
            if self.candidates[number].mask is not None:
                mask = self._mask_of(number, grid)
                self.density[where][:, number] += mask.head_density()
                self.computed[where][:, number] += mask.computed

    def _rows_in(self, grid: TokenGrid) -> torch.Tensor:
        """Return int64 [R], ascending: the queries looked at in calls of a grid."""
        if grid not in self._rows:
            self._rows[grid] = sample_rows(grid.total, len(self.sites.rows), _OTHER_SEED)
        return self._rows[grid]

    def _mask_of(self, number: int, grid: TokenGrid) -> BlockMask:
        """Return the mask of a candidate whose mask depends on the grid alone."""
        candidate = self.candidates[number]
        if candidate.mask is not None and grid == self.sites.grid:
            return candidate.mask
        if (number, grid) not in self._masks:
            method: Any = candidate.method
            self._masks[number, grid] = method.mask(grid)
        return self._masks[number, grid]

    def _rows_of(self, number: int, grid: TokenGrid) -> torch.Tensor:
        """Return bool [H or 1, R, N] of a candidate, expanded once per generation."""
        if (number, grid) not in self._kept:
            mask = self._mask_of(number, grid)
            self._kept[number, grid] = mask_rows(mask, self._rows_in(grid))
        return self._kept[number, grid]

    def _note_shape(self, call: AttentionCall, weight: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the rows to the head's map and bands; extra keys behind the sequence are left out.

        A call counts once, whatever its batch and its number of rows.
        """
        where = (call.layer, self.sites.range_of(call.step))
        tokens = call.grid.total
        share = (weight / weight.sum(dim=-1, keepdim=True))[..., :tokens].cpu()
        keys = band_keys(call.grid, tuple(rows.tolist()))
        even = len(self.sites.rows) / (len(self._rows_in(call.grid)) * len(call.query))
        mass = torch.einsum("hrn,brn->hb", share, keys.to(share.dtype)) * even
        self.bands[where] += mass.double()
        self.maps[where] += small_map(share, rows, tokens, self._side) * even

    def _chosen(
        self,
        call: AttentionCall,
        backend: Backend,
        dense: torch.Tensor,
        error: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Return the output of each head's candidate of least error plus penalty.

        Args:
            call: of all heads.
            backend: runs it.
            dense: [B, S, H, D], what heads give that stay dense.
            error: [H, C] relative squared error.
            kept: [H, C] share of pairs this call would keep.
        """
        assert self.carry is not None
        best = (error + self.carry * kept).argmin(dim=1)
        out = dense.clone()
        for number in sorted({int(b) for b in best} - {0}):
            heads = (best == number).nonzero().flatten().tolist()
            part = replace(call.heads(heads), memory={})
            where = torch.tensor(heads, device=out.device)
            out.index_copy_(2, where, self.candidates[number].method.attend(part, backend))
        return out


def _branch(call: AttentionCall) -> str:
    return call.branch if call.branch in BRANCHES else ""


def _size(rows: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """Return float64 [H]: sum over rows of the squared length, behind the output projection."""
    if gain is None:
        return rows.double().square().sum(dim=(1, 2)).cpu()
    return ((rows @ gain.to(rows.device, rows.dtype)) * rows).double().sum(dim=(1, 2)).cpu()
