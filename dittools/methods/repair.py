"""Probe-row repair: what a few exactly known rows say of the error of all rows, taken off.

Source: SparsePR (arXiv:2608.18484): a ridge regression from the sparse output to its error, cut to
few directions. This project's additions: rows are drawn at random instead of near group means, and
a gate. The regression is fitted on three quarters of the rows and predicts the last, four times
over; how well it does so scales the repair of the head, down to none. Shares that depend on the
fitted rows themselves would always look good.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

RIDGE = 0.1  # of the number of rows, on standardised outputs
RANK = 16  # directions of the error that SparsePR repairs
FOLDS = 4


class Repair(NamedTuple):
    """What probe rows say of a call: a linear map from its output to its error, per head.

    Attributes:
        slope: float32 [H, D, D].
        offset: float32 [H, 1, D].
        gate: float32 [H], share of the predicted error that is worth taking off.
        before: float32 [H], relative error of the rows.
        after: float32 [H], relative error of rows the regression had not seen, repaired.
    """

    slope: torch.Tensor
    offset: torch.Tensor
    gate: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    def apply(self, out: torch.Tensor, span: slice, heads: torch.Tensor | None = None) -> None:
        """Take the predicted error off the tokens `span` of [1, S, H, D], in place.

        Only of `heads`, bool [H]. Heads with nothing to gain are not touched, not even by rounding.
        """
        worth = (self.gate > 0) & (self.before > 0)
        useful = (worth if heads is None else worth & heads).nonzero().flatten()
        if not len(useful):
            return
        every = len(useful) == len(self.gate)
        part = out[0, span] if every else out[0, span].index_select(1, useful)
        video = part.transpose(0, 1).float()
        gate = self.gate[useful, None, None]
        eye = torch.eye(video.shape[2], device=out.device)
        fixed = torch.baddbmm(gate * self.offset[useful], video, eye + gate * self.slope[useful])
        fixed = fixed.transpose(0, 1).to(out.dtype)
        if every:
            out[0, span] = fixed
        else:
            out[0, span] = out[0, span].index_copy(1, useful, fixed)


def fit_repair(
    found: torch.Tensor,
    exact: torch.Tensor,
    *,
    ridge: float = RIDGE,
    rank: int = RANK,
    gated: bool = True,
    weight: torch.Tensor | None = None,
) -> Repair:
    """Return the repair that some rows ask for.

    Args:
        found: [1, R, H, D], sparse.
        exact: [1, R, H, D], dense.
        ridge: weight of the penalty per row.
        rank: directions of the error that are kept; 0 for all.
        gated: whether rows held out decide how much is taken off.
        weight: [H, R], rows each row stands for; all alike without.
    """
    x, true = (t[0].transpose(0, 1).float() for t in (found, exact))  # [H, R, D]
    error = true - x
    root = None
    if weight is not None:
        root = (weight / weight.mean(1, keepdim=True)).sqrt()[..., None].to(x)
    size = _power(true, root).clamp(min=1e-30)
    before = (_power(error, root) / size).sqrt()
    seen, held = _folds(x.shape[1], x.device)
    some = None if root is None else root[:, seen].flatten(0, 1)
    fit = _fit(x[:, seen].flatten(0, 1), error[:, seen].flatten(0, 1), ridge, rank, some)
    guess = torch.baddbmm(fit.offset, x[:, held].flatten(0, 1), fit.slope)
    guess = guess.view(x.shape[0], -1, x.shape[2])
    asked = error[:, held.flatten()]
    kept = None if root is None else root[:, held.flatten()]
    both = asked * guess if kept is None else asked * guess * kept.square()
    gate = (both.sum(dim=(1, 2)) / _power(guess, kept).clamp(min=1e-30)).clamp(0, 1)
    gate = gate if gated else torch.ones_like(gate)
    left = _power(asked - gate[:, None, None] * guess, kept)
    after = (left / _power(true[:, held.flatten()], kept).clamp(min=1e-30)).sqrt()
    fit = _fit(x, error, ridge, rank, root)
    return Repair(fit.slope, fit.offset, gate, before, after)


@lru_cache(maxsize=16)
def _folds(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 [FOLDS, n]: the rows each fold learns from, and those it is asked about."""
    whole = torch.arange(rows // FOLDS * FOLDS)
    held = whole.view(-1, FOLDS).t()
    seen = torch.stack([whole[whole % FOLDS != fold] for fold in range(FOLDS)])
    return seen.to(device), held.to(device)


class _Fit(NamedTuple):
    slope: torch.Tensor  # [H, D, D]
    offset: torch.Tensor  # [H, 1, D]


def _power(rows: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """Return [H]: the sum of squares of [H, R, D], each row times its root [H, R, 1]."""
    return (rows if root is None else rows * root).square().sum(dim=(1, 2))


def _fit(
    found: torch.Tensor, error: torch.Tensor, ridge: float, rank: int, root: torch.Tensor | None
) -> _Fit:
    """Return the regression from outputs [H, R, D] to errors, solved in the R x R dual.

    `root` [H, R, 1] is the square root of the weight of each row, 1 in the mean of squares.
    """
    if root is None:
        mean, shift = found.mean(1, keepdim=True), error.mean(1, keepdim=True)
        spread = found.std(1, keepdim=True, correction=min(1, found.shape[1] - 1))
    else:
        share = root.square() / root.square().sum(1, keepdim=True)
        mean, shift = ((x * share).sum(1, keepdim=True) for x in (found, error))
        spread = ((found - mean).square() * share).sum(1, keepdim=True).sqrt()
    spread = spread.clamp(min=1e-6 * (1 + mean.abs()))
    x, apart = (found - mean) / spread, error - shift
    if root is not None:
        x, apart = x * root, apart * root
    gram = x @ x.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(ridge * found.shape[1])
    slope = x.transpose(1, 2) @ torch.linalg.solve(gram, apart)
    if 0 < rank < min(apart.shape[1:]):
        directions = torch.linalg.svd(apart, full_matrices=False).Vh[:, :rank]
        slope = slope @ directions.transpose(1, 2) @ directions
    slope = slope / spread.transpose(1, 2)
    return _Fit(slope, shift - mean @ slope)
