"""Which blocks of an attention matrix are computed, exact to the token where a block is cut."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from dittools.errors import UnsupportedCall
from dittools.grid import Segments, TokenGrid
from dittools.order import TokenOrder

DENSE_LIMIT = 4096  # tokens; above it nothing in dittools may build an N x N object unasked


class BlockLists(NamedTuple):
    """The kept blocks as one compressed row per (head, query block): full blocks first, then cut.

    Attributes:
        indptr: int32 [rows + 1]; rows = heads * q_blocks; row r is indptr[r]:indptr[r + 1].
        full_end: int32 [rows]; entries indptr[r]:full_end[r] are whole blocks.
        block: int32 [entries]; key block of each entry, ascending within each of the two parts.
        tile: int32 [entries]; row of `BlockMask.tiles`, -1 for whole blocks.
    """

    indptr: torch.Tensor
    full_end: torch.Tensor
    block: torch.Tensor
    tile: torch.Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Block-level mask; True = computed, as in SDPA.

    Not to be changed in place: what is counted and listed once, and copies on devices, are kept.

    Attributes:
        keep: bool [H or 1, q_blocks, kv_blocks].
        block_size: tokens per block, one number or (query block, key block).
        tile_index: int32 like keep, row of `tiles` for blocks only partly kept, -1 elsewhere.
        tiles: uint8 [n, q_block, ceil(kv_block / 8)], bit j of byte i is key 8 i + j.
        order: slots the blocks are cut from; None means the sequence as it stands.
        q_tokens, kv_tokens: length of the sequence; 0 means whole blocks.
        pairs: float64 [H or 1], the pairs really kept, for whole blocks whose padding the caller
            leaves out by other means; None counts what the blocks and bit tiles say.
    """

    keep: torch.Tensor
    block_size: int | tuple[int, int]
    tile_index: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    order: TokenOrder | None = None
    q_tokens: int = 0
    kv_tokens: int = 0
    pairs: torch.Tensor | None = None
    _cache: dict[str, BlockLists] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check what every user of the mask relies on."""
        sizes = self.block_size if isinstance(self.block_size, tuple) else (self.block_size,) * 2
        if self.keep.dim() != 3 or self.keep.dtype != torch.bool or min(sizes) < 1:
            raise UnsupportedCall(
                "block mask is malformed",
                expected="bool [heads or 1, q_blocks, kv_blocks] and a positive block size",
                got=f"{self.keep.dtype} {tuple(self.keep.shape)}, block_size {self.block_size}",
            )
        if (self.tiles is None) != (self.tile_index is None):
            raise UnsupportedCall("block mask needs tiles and tile_index together, got one of them")
        if self.tile_index is not None and self.tile_index.shape != self.keep.shape:
            raise UnsupportedCall(
                "tile_index does not match keep",
                expected=str(tuple(self.keep.shape)),
                got=str(tuple(self.tile_index.shape)),
            )
        for name, tokens, blocks, size in (
            ("q_tokens", self.q_tokens or self.q_slots, self.keep.shape[1], sizes[0]),
            ("kv_tokens", self.kv_tokens or self.kv_slots, self.keep.shape[2], sizes[1]),
        ):
            if self.order is None and -(-tokens // size) != blocks:
                raise UnsupportedCall(
                    f"block mask does not cover {name}",
                    expected=f"{-(-tokens // size)} blocks of {size} for {tokens} tokens",
                    got=f"{blocks} blocks",
                )
        if self.order is not None and -(-self.order.slots // sizes[0]) != self.keep.shape[1]:
            raise UnsupportedCall(
                "block mask does not cover its token order",
                expected=f"{-(-self.order.slots // sizes[0])} query blocks",
                got=str(self.keep.shape[1]),
            )

    @property
    def q_block(self) -> int:
        """Tokens per query block."""
        return self.block_size[0] if isinstance(self.block_size, tuple) else self.block_size

    @property
    def kv_block(self) -> int:
        """Tokens per key block."""
        return self.block_size[1] if isinstance(self.block_size, tuple) else self.block_size

    @property
    def q_slots(self) -> int:
        """Slots the query blocks cover, the padded tail included."""
        return int(self.keep.shape[1]) * self.q_block

    @property
    def kv_slots(self) -> int:
        """Slots the key blocks cover, the padded tail included."""
        return int(self.keep.shape[2]) * self.kv_block

    @property
    def kept_blocks(self) -> int:
        """Blocks that are computed; counted once per mask, which a GPU is waited for."""
        if self not in _KEPT:
            _KEPT[self] = int(self.keep.count_nonzero())
        return _KEPT[self]

    @property
    def is_whole(self) -> bool:
        """Whether every pair is kept."""
        return self.tiles is None and self.kept_blocks == self.keep.numel()

    @property
    def computed(self) -> float:
        """Share of blocks that are computed at all: what the mask costs."""
        share = self.kept_blocks / max(1, self.keep.numel())
        return torch.tensor(share, dtype=torch.float32).item()  # as plans and tables on disk say it

    @property
    def density(self) -> float:
        """Share of query-key pairs kept, mean over heads.

        Without bit tiles every block counts whole, a ragged tail too; with them it is exact.
        """
        if self.tiles is None and self.pairs is None:
            return self.computed
        return float(self.head_density().mean())

    def head_density(self) -> torch.Tensor:
        """Return float64 [H or 1]: `density` per head."""
        if self.pairs is not None:
            return self.pairs / (
                (self.q_tokens or self.q_slots) * (self.kv_tokens or self.kv_slots)
            )
        if self.tiles is None or self.tile_index is None:
            return self.keep.double().mean(dim=(1, 2))
        bits = unpack_bits(self.tiles, self.kv_block).sum(dim=(1, 2)).double()
        q_sizes, k_sizes = self._real_sizes()
        whole = (q_sizes[:, None] * k_sizes).expand_as(self.keep)
        pairs = torch.where(self.tile_index >= 0, bits[self.tile_index.clamp(min=0).long()], whole)
        total = (self.q_tokens or self.q_slots) * (self.kv_tokens or self.kv_slots)
        return (pairs * self.keep).sum(dim=(1, 2)) / total

    def _real_sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (padding slots not counted) of every query and key block, float64."""
        sizes = []
        for blocks, size, tokens in (
            (self.keep.shape[1], self.q_block, self.q_tokens),
            (self.keep.shape[2], self.kv_block, self.kv_tokens),
        ):
            start = torch.arange(blocks, dtype=torch.float64, device=self.keep.device) * size
            if self.order is not None and self.order.has_padding:
                start.fill_(0)  # padding is cut out by bit tiles; a whole block has none
                sizes.append(start + size)
            else:
                sizes.append((float(tokens or blocks * size) - start).clamp(max=size))
        return sizes[0], sizes[1]

    def lists(self) -> BlockLists:
        """Return the kept blocks as compressed rows; computed once per mask."""
        if "lists" not in self._cache:
            self._cache["lists"] = _compress(self)
        return self._cache["lists"]

    def heads(self, index: list[int]) -> "BlockMask":
        """Return the mask of some heads; a shared mask is returned as it is."""
        order = self.order
        if order is not None and order.index.shape[0] > 1:
            order = TokenOrder(order.index[index], order.tokens)
        elif self.keep.shape[0] == 1:
            return self
        shared = self.keep.shape[0] == 1
        return replace(
            self,
            keep=self.keep if shared else self.keep[index],
            tile_index=self.tile_index
            if shared or self.tile_index is None
            else self.tile_index[index],
            order=order,
            pairs=self.pairs if shared or self.pairs is None else self.pairs[index],
            _cache={},
        )

    def to(self, device: torch.device) -> "BlockMask":
        """Return the mask on a device, itself if it is there already, else the same copy always."""
        if self.keep.device == device:
            return self
        copies = _COPIES.setdefault(self, {})
        if device not in copies:
            copies[device] = self._copied(device)
        return copies[device]

    def _copied(self, device: torch.device) -> "BlockMask":
        made = replace(
            self,
            keep=self.keep.to(device),
            tile_index=None if self.tile_index is None else self.tile_index.to(device),
            tiles=None if self.tiles is None else self.tiles.to(device),
            order=None if self.order is None else self.order.to(device),
            pairs=None if self.pairs is None else self.pairs.to(device),
            _cache={
                name: BlockLists(*(t.to(device) for t in lists))
                for name, lists in self._cache.items()
            },
        )
        _KEPT[made] = self.kept_blocks
        return made

    def rows(self, head: int, q_block: int) -> torch.Tensor:
        """Return bool [q_block, kv_slots]: the exact slots one query block attends to."""
        row = self.keep[head, q_block].repeat_interleave(self.kv_block).repeat(self.q_block, 1)
        if self.tiles is not None and self.tile_index is not None:
            for block in (self.tile_index[head, q_block] >= 0).nonzero().flatten().tolist():
                part = slice(block * self.kv_block, (block + 1) * self.kv_block)
                tile = self.tiles[self.tile_index[head, q_block, block]]
                row[:, part] &= unpack_bits(tile[None], self.kv_block)[0]
        return row

    def to_dense(self) -> torch.Tensor:
        """Return bool [H or 1, q_tokens, kv_tokens] in the sequence's own order; for small N."""
        heads, q_blocks, _ = self.keep.shape
        rows = [torch.cat([self.rows(h, q) for q in range(q_blocks)]) for h in range(heads)]
        dense = torch.stack(rows)
        if self.order is None:
            return dense[:, : self.q_tokens or self.q_slots, : self.kv_tokens or self.kv_slots]
        extra = (self.kv_tokens or self.order.tokens) - self.order.tokens
        inverse = self.order.inverse
        count = max(heads, inverse.shape[0])
        out = dense.new_empty((count, self.order.tokens, self.order.tokens + extra))
        for h in range(count):
            slot = inverse[min(h, inverse.shape[0] - 1)]
            tail = torch.arange(self.order.slots, self.order.slots + extra)
            out[h] = dense[min(h, heads - 1)][slot][:, torch.cat((slot, tail))]
        return out

    def to_flex(self) -> "torch.nn.attention.flex_attention.BlockMask":
        """Return this mask for FlexAttention in slot space: apply `order` to the tensors first."""
        from dittools.flex_mask import flex_block_mask

        return flex_block_mask(self)

    @staticmethod
    def full(q_tokens: int, kv_tokens: int, block_size: int) -> "BlockMask":
        """Return the mask that keeps everything."""
        shape = (1, -(-q_tokens // block_size), -(-kv_tokens // block_size))
        keep = torch.ones(shape, dtype=torch.bool)
        return BlockMask(keep, block_size, q_tokens=q_tokens, kv_tokens=kv_tokens)

    @staticmethod
    def from_segments(
        grid: TokenGrid, segments: Segments, kept: torch.Tensor, block_size: int
    ) -> "BlockMask":
        """Keep a block when any pair of its segments is kept; text is always kept.

        Args:
            grid: geometry of the sequence.
            segments: grid.segments(block_size), n runs.
            kept: bool [n, n], True where the two runs attend.
            block_size: tokens.
        """
        text = segments.frame < 0
        kept = (kept | text | text[:, None]).float()
        blocks = grid.blocks(block_size)
        rows = kept.new_zeros((blocks, kept.shape[1])).index_add_(0, segments.block, kept)
        both = rows.new_zeros((blocks, blocks)).index_add_(1, segments.block, rows)
        return BlockMask(both[None] > 0, block_size, q_tokens=grid.total, kv_tokens=grid.total)

    @staticmethod
    def from_dense(dense: torch.Tensor, block_size: int) -> "BlockMask":
        """Build the exact mask of bool [H or 1, S_q, S_k]; for small sequences and tests."""
        heads, q_tokens, kv_tokens = dense.shape
        if max(q_tokens, kv_tokens) > DENSE_LIMIT:
            raise UnsupportedCall(
                "a token-level mask is too large to build a block mask from",
                expected=f"at most {DENSE_LIMIT} tokens",
                got=f"{q_tokens} x {kv_tokens}",
                remedy="build it from segments or axes instead",
            )
        q_blocks, kv_blocks = -(-q_tokens // block_size), -(-kv_tokens // block_size)
        padded = dense.new_zeros((heads, q_blocks * block_size, kv_blocks * block_size))
        padded[:, :q_tokens, :kv_tokens] = dense
        cut = padded.view(heads, q_blocks, block_size, kv_blocks, block_size).transpose(2, 3)
        keep = cut.any(-1).any(-1)
        real = torch.zeros_like(padded)
        real[:, :q_tokens, :kv_tokens] = True  # whole = all real pairs kept: the tail stays whole
        real = real.view(heads, q_blocks, block_size, kv_blocks, block_size).transpose(2, 3)
        partial = keep & ~(cut | ~real).all(-1).all(-1)
        bits, where = torch.unique(pack_bits(cut[partial]), dim=0, return_inverse=True)
        index = torch.full(keep.shape, -1, dtype=torch.int32)
        index[partial] = where.to(torch.int32)
        some = bool(partial.any())
        return BlockMask(
            keep,
            block_size,
            tile_index=index if some else None,
            tiles=bits if some else None,
            q_tokens=q_tokens,
            kv_tokens=kv_tokens,
        )


_KEPT: "WeakKeyDictionary[BlockMask, int]" = WeakKeyDictionary()
_COPIES: "WeakKeyDictionary[BlockMask, dict[torch.device, BlockMask]]" = WeakKeyDictionary()


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack bool [..., k] into uint8 [..., ceil(k / 8)], lowest bit first."""
    short = -bits.shape[-1] % 8
    if short:
        bits = torch.cat((bits, bits.new_zeros((*bits.shape[:-1], short))), dim=-1)
    weights = 2 ** torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.view(*bits.shape[:-1], bits.shape[-1] // 8, 8) * weights).sum(
        -1, dtype=torch.uint8
    )


def unpack_bits(packed: torch.Tensor, length: int) -> torch.Tensor:
    """Undo `pack_bits`: uint8 [..., bytes] to bool [..., length]."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :length].bool()


def _compress(mask: BlockMask) -> BlockLists:
    kv_blocks = mask.keep.shape[2]
    keep = mask.keep.reshape(-1, kv_blocks)
    place = _true_places(keep.flatten(), mask)
    row, block = place // kv_blocks, place % kv_blocks
    counts = keep.sum(1)
    whole, tile = counts, torch.full_like(block, -1)
    if mask.tile_index is not None:
        tiles = mask.tile_index.reshape(-1, kv_blocks)
        tile = tiles.flatten()[place].long()
        by_part = torch.argsort(row * 2 + (tile >= 0), stable=True)
        block, tile = block[by_part], tile[by_part]
        whole = (keep & (tiles < 0)).sum(1)
    start = torch.zeros(len(counts) + 1, dtype=torch.int32, device=keep.device)
    start[1:] = counts.cumsum(0)
    return BlockLists(start, (start[:-1] + whole).int(), block.int(), tile.int())


def _true_places(flat: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Return int64 [kept blocks], ascending; on a GPU nothing is waited for but their number."""
    if flat.device.type == "cuda":
        return torch.nonzero_static(flat, size=mask.kept_blocks).flatten()
    return flat.nonzero().flatten()
