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
) -> Repair:
    """Return the repair that some rows ask for.

    Args:
        found: [1, R, H, D], sparse.
        exact: [1, R, H, D], dense.
        ridge: weight of the penalty per row.
        rank: directions of the error that are kept; 0 for all.
        gated: whether rows held out decide how much is taken off.
    """
    x, true = (t[0].transpose(0, 1).float() for t in (found, exact))  # [H, R, D]
    error = true - x
    size = true.square().sum(dim=(1, 2)).clamp(min=1e-30)
    before = (error.square().sum(dim=(1, 2)) / size).sqrt()
    seen, held = _folds(x.shape[1], x.device)
    fit = _fit(x[:, seen].flatten(0, 1), error[:, seen].flatten(0, 1), ridge, rank)
    guess = torch.baddbmm(fit.offset, x[:, held].flatten(0, 1), fit.slope)
    guess = guess.view(x.shape[0], -1, x.shape[2])
    asked = error[:, held.flatten()]
    power = guess.square().sum(dim=(1, 2))
    gate = ((asked * guess).sum(dim=(1, 2)) / power.clamp(min=1e-30)).clamp(0, 1)
    gate = gate if gated else torch.ones_like(gate)
    left = (asked - gate[:, None, None] * guess).square().sum(dim=(1, 2))
    after = (left / true[:, held.flatten()].square().sum(dim=(1, 2)).clamp(min=1e-30)).sqrt()
    fit = _fit(x, error, ridge, rank)
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


def _fit(found: torch.Tensor, error: torch.Tensor, ridge: float, rank: int) -> _Fit:
    """Return the regression from outputs [H, R, D] to errors, solved in the R x R dual."""
    mean = found.mean(1, keepdim=True)
    spread = found.std(1, keepdim=True).clamp(min=1e-6 * (1 + mean.abs()))
    x = (found - mean) / spread
    shift = error.mean(1, keepdim=True)
    apart = error - shift
    gram = x @ x.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(ridge * found.shape[1])
    slope = x.transpose(1, 2) @ torch.linalg.solve(gram, apart)
    if 0 < rank < min(apart.shape[1:]):
        directions = torch.linalg.svd(apart, full_matrices=False).Vh[:, :rank]
        slope = slope @ directions.transpose(1, 2) @ directions
    slope = slope / spread.transpose(1, 2)
    return _Fit(slope, shift - mean @ slope)
