"""What metered attention remembers of a site from step to step, and when that is stale."""

from dataclasses import dataclass

import torch

from dittools.mask import BlockMask
from dittools.methods.repair import Rows
from dittools.order import TokenOrder


@dataclass
class State:
    """What one site remembers from step to step, over its heads.

    Attributes:
        order: slots of every head.
        alike: int32 [H, N], the grid's keys in groups of alike ones, where blocks are made of them.
        cut: the step of these groups.
        kept: bool [H, blocks, key blocks], what was chosen.
        mask: what runs; None when it has to be made of `kept` again.
        base: float [H], error on the probe rows when a head's blocks were chosen; NaN before.
        last: the same at the last call.
        high: bool [H], heads whose error passes the limit.
        turned: bool [H], heads that passed it, either way, at the last call.
        held: bool [H], heads that are dense in the start of the run.
        broken: bool [H], heads that stay dense, their probes were not finite.
        rows: probe rows of earlier calls.
        scores: bfloat16 [H, blocks, key blocks], what blocks were worth when they were chosen.
        step: of these scores.
    """

    order: TokenOrder | None = None
    alike: torch.Tensor | None = None
    cut: int = -1
    kept: torch.Tensor | None = None
    mask: BlockMask | None = None
    base: torch.Tensor | None = None
    last: torch.Tensor | None = None
    high: torch.Tensor | None = None
    turned: torch.Tensor | None = None
    held: torch.Tensor | None = None
    broken: torch.Tensor | None = None
    rows: Rows | None = None
    scores: torch.Tensor | None = None
    step: int = -1

    def stale(self, growth: float, turns: bool) -> torch.Tensor:
        """Return bool [H]: heads whose error is more than `growth` times what it was.

        With `turns` also those that passed the limit, either way, at the last call.
        """
        assert self.base is not None
        assert self.last is not None
        found = self.last > growth * self.base
        return found | self.turned if turns and self.turned is not None else found

    def cut_anew(self, alike: torch.Tensor, step: int) -> None:
        """Take other groups of keys; what was known of the blocks of earlier ones is forgotten."""
        self.alike, self.cut = alike, step
        self.kept = self.mask = self.base = self.scores = None

    def knows(self, step: int) -> bool:
        """Whether there are scores of an earlier step of this run, of the blocks there are now."""
        return self.scores is not None and step >= self.step

    def with_scores(
        self, score: torch.Tensor, which: torch.Tensor, step: int, carry: float
    ) -> torch.Tensor:
        """Return scores [n, blocks, key blocks] of the heads `which`, earlier ones added.

        Earlier ones count `carry` times what they did. They are kept in half precision: that is
        enough to rank by, and long sequences have many blocks. Those of a run before are forgotten.
        """
        known = self.scores
        if known is not None and self.knows(step):
            score = score + carry * known.index_select(0, which)
        half = score.to(torch.bfloat16)
        if known is None or len(known) == len(which):
            self.scores = half
        else:
            self.scores = known.index_copy(0, which, half)
        self.step = step
        return score

    def chosen(self, kept: torch.Tensor, which: torch.Tensor) -> None:
        """Take blocks [n, blocks, key blocks] of the heads `which`, int64 [n]."""
        if self.kept is None or len(which) == len(self.kept):
            self.kept = kept
            self.base = None
        else:
            self.kept = self.kept.index_copy(0, which, kept)
            if self.base is not None:
                self.base = self.base.index_fill(0, which, float("nan"))
        self.mask = None

    def dense(self) -> torch.Tensor | None:
        """Return bool [H]: heads that run dense for now; None for none."""
        if self.held is None or self.broken is None:
            return self.broken if self.held is None else self.held
        return self.held | self.broken

    def note(self, error: torch.Tensor, high: torch.Tensor | None) -> None:
        """Remember the error of a call as it came, and which heads pass the limit as it left."""
        self.last = error
        known = self.base
        self.base = error if known is None else torch.where(known.isnan(), error, known)
        if high is not None:
            self.turned = high if self.high is None else high != self.high
            self.high = high
