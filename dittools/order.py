"""A permutation of the tokens of a sequence, with padding slots where blocks must stay aligned."""

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from dittools.errors import UnsupportedCall
from dittools.grid import TokenGrid


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Which token stands in which slot.

    Attributes:
        index: int64 [H or 1, slots]; index[h, slot] is the token there, -1 for a padding slot.
        tokens: length of the sequence that is reordered; every token stands in exactly one slot.
    """

    index: torch.Tensor
    tokens: int
    _inverse: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the shape; the permutation property is checked by `is_valid` on demand."""
        if self.index.dim() != 2 or self.index.shape[1] < self.tokens:
            raise UnsupportedCall(
                "token order has the wrong shape",
                expected=f"[heads or 1, at least {self.tokens} slots]",
                got=str(tuple(self.index.shape)),
            )

    @property
    def slots(self) -> int:
        """Length of the reordered sequence, padding slots included."""
        return int(self.index.shape[1])

    @property
    def has_padding(self) -> bool:
        """Whether some slots hold no token."""
        return self.slots > self.tokens

    @property
    def inverse(self) -> torch.Tensor:
        """int64 [H or 1, tokens]: the slot of each token, on the device of `index`."""
        if "inverse" not in self._inverse:
            slots = torch.arange(self.slots, device=self.index.device).expand_as(self.index)
            inverse = self.index.new_empty((self.index.shape[0], self.tokens + 1))
            inverse.scatter_(1, self.index.remainder(self.tokens + 1), slots)  # -1 -> last column
            self._inverse["inverse"] = inverse[:, : self.tokens].contiguous()
        return self._inverse["inverse"]

    @property
    def _holes(self) -> torch.Tensor:
        """int64 [n]: the padding slots of an order shared by all heads."""
        if "holes" not in self._inverse:
            hole, count = self.index[0] < 0, self.slots - self.tokens
            if hole.device.type == "cuda":  # their number is known: nothing to wait for
                self._inverse["holes"] = torch.nonzero_static(hole, size=count).flatten()
            else:
                self._inverse["holes"] = hole.nonzero().flatten()
        return self._inverse["holes"]

    def is_valid(self) -> bool:
        """Whether every token stands in exactly one slot of every head."""
        ordered = self.index.sort(dim=1).values
        want = torch.arange(self.tokens, device=self.index.device).expand(self.index.shape[0], -1)
        head, tail = ordered[:, : self.slots - self.tokens], ordered[:, self.slots - self.tokens :]
        return bool((head == -1).all()) and bool(torch.equal(tail, want))

    def to(self, device: torch.device) -> "TokenOrder":
        """Return the order on a device: itself if it is there, else the same copy always."""
        if self.index.device == device:
            return self
        copies = _COPIES.setdefault(self, {})
        if device not in copies:
            copies[device] = TokenOrder(self.index.to(device), self.tokens)
        return copies[device]

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Reorder [B, S, H, D] to [B, slots (+ S - tokens), H, D]; padding slots become zeros.

        Tokens past `tokens` (extra keys) keep their place behind the ordered ones.
        """
        order = self.to(tensor.device)
        head, tail = tensor[:, : self.tokens], tensor[:, self.tokens :]
        if order.index.shape[0] == 1:
            out = head.index_select(1, order.index[0].clamp(min=0))
        else:
            where = order.index.clamp(min=0).t()[None, :, :, None]  # [1, slots, H, 1]
            out = head.gather(1, where.expand(head.shape[0], -1, -1, head.shape[-1]))
        if self.has_padding and order.index.shape[0] == 1:
            out = out.index_fill_(1, order._holes, 0)
        elif self.has_padding:
            out = out.masked_fill((order.index < 0).t()[None, :, :, None], 0)
        return torch.cat((out, tail), dim=1) if tail.shape[1] else out

    def undo(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring [B, slots, H, D] back to [B, tokens, H, D]; padding slots are dropped."""
        inverse = self.to(tensor.device).inverse
        if inverse.shape[0] == 1:
            return tensor.index_select(1, inverse[0])
        where = inverse.t()[None, :, :, None]
        return tensor.gather(1, where.expand(tensor.shape[0], -1, -1, tensor.shape[-1]))

    @staticmethod
    def identity(tokens: int) -> "TokenOrder":
        """Return the order that changes nothing."""
        return TokenOrder(torch.arange(tokens)[None], tokens)

    @staticmethod
    def tiles(grid: TokenGrid, tile: tuple[int, int, int]) -> "TokenOrder":
        """Make every tile (frames, height, width) of the grid one run of slots.

        Each tile takes prod(tile) slots, its missing tokens at the border are padding; the text,
        before then after, follows in slots of its own, padded to a multiple of the same size.
        """
        size = tile[0] * tile[1] * tile[2]
        counts = [-(-side // edge) for side, edge in zip(grid.shape, tile, strict=True)]
        axes = [
            torch.arange(count * edge).view(count, edge)
            for count, edge in zip(counts, tile, strict=True)
        ]
        f = axes[0][:, None, None, :, None, None]
        h = axes[1][None, :, None, None, :, None]
        w = axes[2][None, None, :, None, None, :]
        token = (f * grid.height + h) * grid.width + w + grid.text_before
        inside = (f < grid.frames) & (h < grid.height) & (w < grid.width)
        index = torch.where(inside, token, -1).reshape(-1)
        text = torch.cat(
            (torch.arange(grid.text_before), torch.arange(grid.total - grid.text_after, grid.total))
        )
        padding = text.new_full((-len(text) % size,), -1)
        return TokenOrder(torch.cat((index, text, padding))[None], grid.total)


_COPIES: "WeakKeyDictionary[TokenOrder, dict[torch.device, TokenOrder]]" = WeakKeyDictionary()
