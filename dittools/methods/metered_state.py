"""What metered attention remembers of a site from step to step, and when that is stale."""

from dataclasses import dataclass

import torch

from dittools.mask import BlockMask
from dittools.order import TokenOrder


@dataclass
class State:
    """What one site remembers from step to step, over its heads.

    Attributes:
        order: slots of every head.
        kept: bool [H, blocks, blocks], what was chosen.
        mask: what runs; None asks for a new choice.
        base: float [H], error on the probe rows when the blocks were chosen.
        last: the same at the last call.
        high: bool [H], heads whose error passes the limit.
        near: bool [H], heads whose error did not at the last call.
        held: bool [H], heads that are dense in the start of the run.
        broken: bool [H], heads that stay dense, their probes were not finite.
    """

    order: TokenOrder | None = None
    kept: torch.Tensor | None = None
    mask: BlockMask | None = None
    base: torch.Tensor | None = None
    last: torch.Tensor | None = None
    high: torch.Tensor | None = None
    near: torch.Tensor | None = None
    held: torch.Tensor | None = None
    broken: torch.Tensor | None = None

    def wants_choice(self, refresh: float) -> bool:
        """Whether blocks are to be chosen anew: never chosen, or some head's error has grown."""
        if self.mask is None or not refresh:
            return True
        if self.base is None or self.last is None:
            return False
        return bool((self.last > refresh * self.base).any())

    def note(self, before: torch.Tensor, after: torch.Tensor, limit: float) -> None:
        """Remember the error of a call: as it came, which choices answer for, and as it left."""
        self.last = before
        if self.base is None:
            self.base = before
        if limit:
            near = after <= limit
            if self.high is not None and bool((self.high == near).any()):
                self.mask = None  # some head changes between its two densities
            self.near, self.high = near, ~near
