"""Probe-row repair: what a few exactly known rows say of the error of all rows, taken off.

Source: SparsePR (arXiv:2608.18484): a ridge regression from the sparse output to its error, cut to
few directions. This project's additions: the query of a row foretells its error too; rows of
earlier steps, which are other ones, teach along; rows are drawn at random instead of near group
means; and a gate. The regression is fitted on three quarters of the rows and predicts the last,
four times over; how well it does so scales the repair of the head, down to none. Shares that depend
on the fitted rows themselves would always look good.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

RIDGE = 0.1  # of the number of rows, on standardised features
RANK = 16  # directions of the error that SparsePR repairs
FOLDS = 4
FADING = 0.5  # of the weight of rows, from one step to the next


class Rows(NamedTuple):
    """Rows of which the exact output is known.

    Attributes:
        features: float32 [H, R, F], what foretells the error: the output, and the query if asked.
        error: float32 [H, R, D], exact less sparse output.
        root: float32 [H, R, 1], square root of the weight of each row.
    """

    features: torch.Tensor
    error: torch.Tensor
    root: torch.Tensor

    def before(self, others: "Rows | None", most: int) -> "Rows":
        """Return at most so many rows, these and then older ones, all of less weight by a step."""
        rows = (
            self
            if others is None
            else Rows(*(torch.cat(x, 1) for x in zip(self, others, strict=True)))
        )
        rows = Rows(*(x[:, :most] for x in rows))
        return rows._replace(root=rows.root * FADING**0.5)

    def repeated(self, times: int) -> "Rows":
        """Return the same rows for every fold of a head."""
        return Rows(*(x.repeat_interleave(times, 0) for x in self))

    def at(self, index: torch.Tensor) -> "Rows":
        """Return some rows: [FOLDS, n] gives [H * FOLDS, n, ...]."""
        return Rows(*(x[:, index].flatten(0, 1) for x in self))


class Repair(NamedTuple):
    """What probe rows say of a call: a linear map from its features to its error, per head.

    Attributes:
        slope: float32 [H, F, D].
        offset: float32 [H, 1, D].
        gate: float32 [H], share of the predicted error that is worth taking off.
        before: float32 [H], relative error of the rows.
        after: float32 [H], relative error of rows the regression had not seen, repaired.
        rows: what it was fitted on, without those of earlier calls.
    """

    slope: torch.Tensor
    offset: torch.Tensor
    gate: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    rows: Rows

    def apply(
        self,
        out: torch.Tensor,
        span: slice,
        heads: torch.Tensor | None = None,
        query: torch.Tensor | None = None,
    ) -> None:
        """Take the predicted error off the tokens `span` of [1, S, H, D], in place.

        Only of `heads`, bool [H]. Heads with nothing to gain are not touched, not even by rounding.
        `query` [1, S, H, D] is asked for where the fit was given that of its rows.
        """
        worth = (self.gate > 0) & (self.before > 0)
        worth = worth if heads is None else worth & heads
        gate, slope, offset = self.gate[:, None, None], self.slope, self.offset
        every, width, kind = out.device.type != "cpu", out.shape[3], out.dtype
        useful = torch.arange(len(gate), device=out.device)
        if every:  # which heads gain would have to be read back: the others add exactly nothing
            gate, slope, offset = (
                torch.where(worth[:, None, None], x, 0.0) for x in (gate, slope, offset)
            )
        else:
            useful = worth.nonzero().flatten()
            if not len(useful):
                return
            every = len(useful) == len(gate)
            gate, slope, offset = (x[useful] for x in (gate, slope, offset))

        def part(x: torch.Tensor) -> torch.Tensor:
            return x[0, span] if every else x[0, span].index_select(1, useful)

        # the error is small beside the output: half precision has bits enough for it
        slope, change = ((gate * x).to(kind) for x in (slope, offset))
        change = torch.baddbmm(change, part(out).transpose(0, 1), slope[:, :width])
        if query is not None:
            change.baddbmm_(part(query).transpose(0, 1), slope[:, width:])
        if every:
            out[0, span].add_(change.transpose(0, 1))
        else:
            out[0, span] = out[0, span].index_add(1, useful, change.transpose(0, 1))


def fit_repair(
    found: torch.Tensor,
    exact: torch.Tensor,
    *,
    query: torch.Tensor | None = None,
    earlier: Rows | None = None,
    ridge: float = RIDGE,
    rank: int = RANK,
    gated: bool = True,
    weight: torch.Tensor | None = None,
) -> Repair:
    """Return the repair that some rows ask for.

    Args:
        found: [1, R, H, D], sparse.
        exact: [1, R, H, D], dense.
        query: [1, R, H, D], further features; the output alone without.
        earlier: rows of earlier calls, of the same features, that teach but are not asked.
        ridge: weight of the penalty per row.
        rank: directions of the error that are kept; 0 for all.
        gated: whether rows held out decide how much is taken off.
        weight: [H, R], rows each row stands for; all alike without.
    """
    x, true = (t[0].transpose(0, 1).float() for t in (found, exact))  # [H, R, D]
    error, root = true - x, torch.ones_like(x[..., :1])
    if weight is not None:
        root = (weight / weight.mean(1, keepdim=True)).sqrt()[..., None].to(x)
    if query is not None:
        x = torch.cat((x, query[0].transpose(0, 1).float()), dim=2)
    rows = Rows(x, error, root)
    size = _power(true, root).clamp(min=1e-30)
    before = (_power(error, root) / size).sqrt()
    seen, held = _folds(x.shape[1], x.device)
    taught = _with(rows.at(seen), None if earlier is None else earlier.repeated(FOLDS))
    fit = _fit(taught, ridge, rank)
    guess = torch.baddbmm(fit.offset, rows.at(held).features, fit.slope)
    guess = guess.view(x.shape[0], -1, true.shape[2])
    asked, kept = error[:, held.flatten()], root[:, held.flatten()]
    both = (asked * guess * kept.square()).sum(dim=(1, 2))
    gate = (both / _power(guess, kept).clamp(min=1e-30)).clamp(0, 1)
    gate = gate if gated else torch.ones_like(gate)
    left = _power(asked - gate[:, None, None] * guess, kept)
    after = (left / _power(true[:, held.flatten()], kept).clamp(min=1e-30)).sqrt()
    fit = _fit(_with(rows, earlier), ridge, rank)
    return Repair(fit.slope, fit.offset, gate, before, after, rows)


@lru_cache(maxsize=16)
def _folds(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [FOLDS, n]: the rows each fold learns from, and those it is asked about."""
    whole = torch.arange(rows // FOLDS * FOLDS)
    held = whole.view(-1, FOLDS).t()
    seen = torch.stack([whole[whole % FOLDS != fold] for fold in range(FOLDS)])
    return seen.to(device), held.to(device)


class _Fit(NamedTuple):
    slope: torch.Tensor  # [H, F, D]
    offset: torch.Tensor  # [H, 1, D]


def _with(rows: Rows, earlier: Rows | None) -> Rows:
    return (
        rows
        if earlier is None
        else Rows(*(torch.cat(x, 1) for x in zip(rows, earlier, strict=True)))
    )


def _power(rows: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Return [H]: the sum of squares of [H, R, D], each row times its root [H, R, 1]."""
    return (rows * root).square().sum(dim=(1, 2))


def _fit(rows: Rows, ridge: float, rank: int) -> _Fit:
    """Return the regression from features to errors, solved in the R x R dual."""
    share = rows.root.square()
    total = share.sum(1, keepdim=True)
    share = share / total
    mean, shift = ((x * share).sum(1, keepdim=True) for x in rows[:2])
    spread = ((rows.features - mean).square() * share).sum(1, keepdim=True).sqrt()
    spread = spread.clamp(min=1e-6 * (1 + mean.abs()))
    x = (rows.features - mean) / spread * rows.root
    apart = (rows.error - shift) * rows.root
    gram = x @ x.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(ridge * total[:, 0])
    slope = x.transpose(1, 2) @ torch.linalg.solve_ex(gram, apart).result
    if 0 < rank < min(apart.shape[1:]):
        directions = torch.linalg.svd(apart, full_matrices=False).Vh[:, :rank]
        slope = slope @ directions.transpose(1, 2) @ directions
    slope = slope / spread.transpose(1, 2)
    return _Fit(slope, shift - mean @ slope)
